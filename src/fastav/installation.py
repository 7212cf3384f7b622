"""Installed packages: which are missing, and which do not work with each other."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import TracebackType

from fastav.errors import FastAVError, InstallationError, install_hint, reason_of

TORCH_PACKAGES = (
    "torchvision",
    "torchaudio",
    "torchcodec",
    "timm",
)  # compiled for one release of torch, or built on these
IGNORED_PACKAGES = (
    "fastav",
    "transformers",
    "torch",
    "importlib",
    "__main__",
)  # their imports fail because of other packages


def require_packages(what: str, packages: tuple[str, ...], extra: str) -> None:
    """Raise InstallationError if a package is not installed.

    what: the thing that needs the packages. extra: the extra of fastav that installs them.
    """
    if missing := [name for name in packages if not is_installed(name)]:
        are = "is" if len(missing) == 1 else "are"
        raise InstallationError(f"{what} needs {' and '.join(missing)}, which {are} not installed", install_hint(extra))


def is_installed(package: str) -> bool:
    """Whether Python finds the package; it is not imported."""
    with suppress(ValueError):  # a module that was put into sys.modules by hand
        return find_spec(package) is not None
    return package in sys.modules


@contextmanager
def importable() -> Iterator[None]:
    """Turn an exception from the import of another package into an InstallationError.

    transformers imports torchvision, timm and others whenever they are installed, for every model.
    """
    try:
        yield
    except FastAVError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if package := _failed_import(cause.__traceback__) or _incomplete_package(cause):
                raise _broken_package_error(package, cause) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _failed_import(traceback: TracebackType | None) -> str | None:
    """The innermost package whose own code failed while it was imported."""
    package = None
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        if traceback.tb_frame.f_code.co_name == "<module>" and name not in IGNORED_PACKAGES:
            package = name
        traceback = traceback.tb_next
    return package if package and is_installed(package) else None


def _incomplete_package(error: BaseException) -> str | None:
    """The installed package that lacks a module or a name that is imported from it."""
    if not isinstance(error, ImportError) or not error.name:
        return None
    package, submodule, _ = error.name.partition(".")
    if isinstance(error, ModuleNotFoundError) and not submodule:
        return None  # not installed at all
    return package if package not in IGNORED_PACKAGES and is_installed(package) else None


def _broken_package_error(package: str, error: BaseException) -> InstallationError:
    if package in TORCH_PACKAGES:
        return InstallationError(
            f"{_with_version(package)} does not work with {_with_version('torch')}: {reason_of(error)}",
            "install torch and torchvision together, from the same index (README.md, Install), or uninstall "
            f"{package}, which fastav's own models do not need",
        )
    return InstallationError(
        f"{_with_version(package)} cannot be imported: {reason_of(error)}", f"reinstall or uninstall {package}"
    )


def _with_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # importable, but not installed
        return package
