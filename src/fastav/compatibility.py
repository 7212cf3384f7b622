"""The tested releases of fastav's dependencies, read from the ranges of its own metadata (pyproject.toml)."""

import re
import warnings
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

from fastav.errors import FastAVWarning, InstallationError

Release = tuple[int, ...]


class ReleaseRange(NamedTuple):
    """A range of releases: at least `oldest`, and below `beyond`; None where the metadata sets no bound."""

    oldest: Release | None
    beyond: Release | None

    def __str__(self) -> str:
        parts = [f">={_text(self.oldest)}"] if self.oldest else []
        return ",".join([*parts, f"<{_text(self.beyond)}"] if self.beyond else parts)


def require_tested(*packages: str) -> None:
    """Check installed packages against the tested ranges; modules call it before their first import of a package.

    A newer release warns once per package. Packages that are not installed are not checked. If fastav itself runs from
    a folder without being installed, there are no ranges to check against.

    Raises: InstallationError for a release below the range.
    """
    for package in packages:
        _require_tested(package)


@cache
def _require_tested(package: str) -> None:
    try:
        installed, requirements = version(package), requires("fastav") or ()
    except PackageNotFoundError:
        return
    check(package, installed, requirements)


def check(package: str, installed: str, requirements: Iterable[str]) -> None:
    """Compare one installed release with a package's requirements; as `require_tested`."""
    tested, release = declared_range(package, requirements), release_of(installed)
    if tested.oldest is not None and release < tested.oldest:
        raise InstallationError(
            f"{package} {installed} is older than the oldest release that fastav supports ({package}{tested})",
            f"pip install '{package}{tested}'",
        )
    if tested.beyond is not None and release >= tested.beyond:
        warnings.warn(
            f"{package} {installed} is newer than the releases that fastav was tested with ({package}{tested})",
            FastAVWarning,
            stacklevel=2,
        )


def declared_range(package: str, requirements: Iterable[str]) -> ReleaseRange:
    """The range of a package in a list of requirements as metadata writes them, including those of extras."""
    for requirement in requirements:
        name_match = re.match(r"[\w.-]+", requirement)
        if name_match and name_match[0].lower() == package:
            bounds = dict(re.findall(r"(>=|<)\s*([\d.]+)", requirement.partition(";")[0]))
            return ReleaseRange(*(release_of(bounds[sign]) if sign in bounds else None for sign in (">=", "<")))
    return ReleaseRange(None, None)


def release_of(text: str) -> Release:
    """The numbers of a version without trailing zeros: (2, 13) for 2.13.0+cpu."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    release = [int(part) for part in numbers[0].split(".")] if numbers else []
    while release and not release[-1]:
        release.pop()
    return tuple(release)


def _text(release: Release) -> str:
    return ".".join(map(str, release))
