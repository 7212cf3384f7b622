"""The video processors of transformers need torchvision, of which they use the part that is written in Python.

`make setup` puts it beside the environment, not into it, because fastav itself must work without. Its compiled part
wants the very build of torch that it was made for; where that is another, the operators it would define are declared.
Tests of media run without torch, too (tests/media_versions.py), and then nothing is needed.

Modules are imported without looking for garbage, of which they make next to none, and what is there before a file's
tests is not looked at again: it would take a fifth of the time that imports take, and more later.
"""

import gc
import importlib.util
import sys
from pathlib import Path

import pytest

from support import sampled_checks

BESIDE = Path(sys.prefix) / "vision"
_declared = []


def _import_torchvision() -> None:
    import torch

    if importlib.util.find_spec("torchvision") is None:
        sys.path.append(str(BESIDE))
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # it lives as long as this does
        import torchvision  # noqa: F401


sampled_checks.install()
gc.disable()
if importlib.util.find_spec("torch") is not None:
    _import_torchvision()


def pytest_runtest_setup() -> None:
    sampled_checks.next_test()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)  # by which a benchmark would undo that
        yield
