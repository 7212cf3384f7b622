"""Read by Python where PYTHONPATH names its folder: makes what vLLM needs of a GPU's packages importable on a CPU.

vLLM inspects models in processes of their own, which no fixture reaches. The registry's torchvision is compiled for
CUDA; the part that processors use is written in Python, and asks only that its operators be declared.
"""

import os
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


class InterpretedTriton(MetaPathFinder):
    """Lets vLLM's model runner V2, which needs Triton, run on a CPU: its kernels are interpreted.

    The registry's Triton has no backend for CPUs, and vLLM looks for one. The interpreter refuses integers as masks,
    which vLLM's kernel of grammars has. And it cannot run vLLM's kernel of top-k sampling, for which vLLM also has
    code in PyTorch.
    """

    def __init__(self) -> None:
        self.has_backend = False

    def find_spec(self, name, path=None, target=None):
        if name == "vllm.triton_utils" and not self.has_backend:
            self.has_backend = True
            self.add_backend()
            self.take_integer_masks()
        if name == "vllm.v1.worker.gpu.model_runner":
            import vllm.v1.sample.ops.topk_topp_sampler as sampler

            sampler.HAS_TRITON = False

    @staticmethod
    def add_backend() -> None:
        from triton.backends import Backend, backends
        from triton.backends.driver import DriverBase

        class Driver(DriverBase):
            @staticmethod
            def is_active():
                return False  # else torch's compiler would take it

        backends["cpu"] = Backend(compiler=None, driver=Driver)

    @staticmethod
    def take_integer_masks() -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def as_bool(mask):
            if mask is not None and mask.data.dtype != bool:
                mask.data = mask.data.astype(bool)
            return mask

        InterpreterBuilder.create_masked_load = lambda self, ptrs, mask, *rest: load(self, ptrs, as_bool(mask), *rest)
        InterpreterBuilder.create_masked_store = lambda self, ptrs, value, mask, *rest: store(
            self, ptrs, value, as_bool(mask), *rest
        )


if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.meta_path.insert(0, InterpretedTriton())
