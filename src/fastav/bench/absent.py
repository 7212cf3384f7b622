"""What the benchmark does without: PyAV. It reads media files, of which a benchmark of random prompts has none.

`python -m fastav.bench.absent MODULE ...` is `python -m MODULE ...` without it.
"""

import runpy
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def do_without_av() -> None:
    """For the rest of the process let modules that need PyAV be imported where it is not installed.

    Whatever they then ask of it raises ModuleNotFoundError.
    """
    if "av" not in sys.modules and find_spec("av") is None:
        sys.meta_path.append(_Finder())


class _StandIn(type):
    """A class in the place of any class, constant or function: it can be named, and be part of a type."""

    def __getattr__(cls, name: str) -> "_StandIn":
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(name, (Exception,), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ModuleNotFoundError("No module named 'av'", name="av")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> _StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(name, (Exception,), {})


class _Finder(MetaPathFinder, Loader):
    """Comes last, so that whatever is installed is found before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = fullname.partition(".")[0] == "av"
        return ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


if __name__ == "__main__":
    do_without_av()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
