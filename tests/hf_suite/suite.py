"""Finding transformers' suites, which its wheel does not hold, and saying what of them is left out, and why.

FASTAV_HF_SUITE names the folder `tests` of transformers' sources, of the very version that is installed. The source
archive on PyPI has the suites of models and of processors, but neither `tests/generation` nor `tests/exporters`: there,
GenerationTesterMixin and ExportTesterMixin are empty classes here. `make hf-suite HF_TESTS=checkout/tests` runs them.
"""

import importlib
import os
import sys
import unittest
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers

FOLDER = Path(os.environ["FASTAV_HF_SUITE"]).resolve()
NAME = "transformers_suite"
ELSEWHERE = {  # in a checkout, but not in the archive on PyPI: mixin by module
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}


def _module(name: str, **content: Any) -> None:
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(content)


def _prepare() -> None:
    version = (FOLDER.parent / "src" / "transformers" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{transformers.__version__}"' in version, f"{FOLDER} is of another version"
    _module(NAME, __path__=[str(FOLDER)])
    for module, mixin in ELSEWHERE.items():
        package = module.partition(".")[0]
        if not (FOLDER / package).is_dir():
            _module(f"{NAME}.{package}", __path__=[])
            _module(f"{NAME}.{module}", **{mixin: type(mixin, (), {})})
    if not (FOLDER.parent / "utils" / "fetch_hub_objects_for_ci.py").is_file():
        _module("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)


_prepare()
modeling: Any = importlib.import_module(f"{NAME}.test_modeling_common")
processing: Any = importlib.import_module(f"{NAME}.test_processing_common")
has_generation = (FOLDER / "generation").is_dir()


def leaving_out(reasons: Mapping[str, str]) -> Callable[[type], type]:
    """Skip these tests of a class, each with its reason in words; names are patterns."""

    def apply(suite: type) -> type:
        for pattern, reason in reasons.items():
            names = [name for name in dir(suite) if fnmatchcase(name, pattern)]
            assert names, f"{suite.__name__} has no test {pattern}"
            for name in names:
                setattr(suite, name, unittest.skip(reason)(_copy(getattr(suite, name))))
        return suite

    return apply


def _copy(test: Any) -> Any:
    """A function of its own, since the mixin's is shared by all families."""

    @wraps(test)
    def run(*args: Any) -> Any:
        return test(*args)

    return run
