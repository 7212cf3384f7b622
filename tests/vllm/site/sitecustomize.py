"""Read by Python where PYTHONPATH names its folder: makes torchvision importable beside a CPU build of torch.

vLLM inspects models in processes of their own, which no fixture reaches. The registry's torchvision is compiled for
CUDA; the part that processors use is written in Python, and asks only that its operators be declared.
"""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

BESIDE = Path(sys.prefix) / "vision"


class Operators(MetaPathFinder):
    """Declares the operators of torchvision's compiled part just before its Python part describes them."""

    def __init__(self) -> None:
        self.declared = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations" and self.declared is None and "torch" in sys.modules:
            import torch

            self.declared = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if BESIDE.is_dir():
    sys.path.append(str(BESIDE))
    sys.meta_path.insert(0, Operators())
