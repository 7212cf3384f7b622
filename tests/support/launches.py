"""A device that is not there: which kernels code would launch on it, and whether the host would ever wait for it.

Tensors on PyTorch's `meta` device have shapes and hold nothing: whoever asks for a value gets an error, and code that
does more on a CPU than elsewhere does not do it here. What is seen is the order of operations, not their time, nor how
many kernels an operation is made of.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from support.trees import decompose, tensors

DEVICE = torch.device("meta")

_aten = torch.ops.aten
# they make a tensor without a kernel, as views do, which say so themselves
_FREE = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten._unsafe_view.default,
    _aten._reshape_alias.default,
    _aten.lift_fresh.default,
}
# the host needs a value, or the size of the result depends on one
_WAITING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}


class WouldWait(AssertionError):
    """The host would wait for the device."""


class Launches(TorchDispatchMode):
    """While active, collects in `names` the operations that launch a kernel (or several) on a device, in their order.

    Raises: WouldWait, in the midst of what runs, for whatever makes the host wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question to the tensor
            return func(*args, **kwargs)
        given = _on_device((args, kwargs))
        name = func.name().removeprefix("aten::")
        if given and _waits(name, args, kwargs):
            raise WouldWait(f"{name} makes the host wait for the device")
        if (result := decompose(self, func, args, kwargs)) is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if (given or _on_device(result)) and not (func.is_view or func in _FREE):
            self.names.append(name)
        return result


def launches(run: Callable[[], Any]) -> list[str]:
    """The operations of one call that launch kernels.  Raises: WouldWait."""
    with Launches() as seen:
        run()
    return seen.names


class Alive(TorchDispatchMode):
    """While active, knows which memory on a device was taken and is still held."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result):
            if not tensor.is_cpu and not func.is_view:
                storage = tensor.untyped_storage()
                self._taken[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def bytes(self) -> int:
        """Bytes that are held now."""
        self._taken = {storage: size for storage, size in self._taken.items() if not storage.expired()}
        return sum(self._taken.values())


def _on_device(values: Any) -> bool:
    return any(not tensor.is_cpu for tensor in tensors(values))


def _waits(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    name, _, overload = name.partition(".")
    match name:
        case "repeat_interleave":
            return overload == "Tensor" and kwargs.get("output_size") is None
        case "index" | "index_put" | "index_put_" | "_index_put_impl_":
            indices = [index for index in args[1] if index is not None]
            return any(index.is_cpu or index.dtype in (torch.bool, torch.uint8) for index in indices)
        case "histc":
            low, high, *_ = (*args[2:], *(kwargs.get(name, 0) for name in ("min", "max")), 0)
            return low == high  # then it looks for the range itself
        case "_to_copy":
            return torch.device(kwargs.get("device") or DEVICE).type == "cpu"
        case "copy_":
            return args[0].is_cpu
        case _:
            return name in _WAITING
