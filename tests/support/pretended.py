"""Several devices that are not there: tensors of a CPU that say they are elsewhere, and do not mix.

What is computed is what the CPU computes, so that numbers can be compared. An operation on tensors of two devices
raises, as it would on real ones, unless it copies from one to the other; a tensor without axes that is on the CPU may
go anywhere. Kinds of devices with code of their own (CUDA's streams, pinned memory) are not pretended.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from support.trees import decompose, map_tensors, tensors

FIRST, SECOND = (torch.device("xla", number) for number in range(2))  # that torch names, and this build does not have
CPU = torch.device("cpu")

_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
# they switch to the tensor's device, of which there is no driver here
_GUARDED = {
    *(Tensor.__getitem__, Tensor.__setitem__, Tensor.__int__, Tensor.__index__, Tensor.__invert__),
    *(Tensor.contiguous, Tensor.copy_, Tensor.nonzero, torch.nonzero),
    *(torch.nn.functional.interpolate, torch.nn.functional.multi_head_attention_forward),
}
_guarded: list[Any] = []


class Mixed(AssertionError):
    """An operation was given tensors of several devices."""


class _Elsewhere(Tensor):
    """A tensor that says it is on a device; `here` is the tensor of the CPU that holds its numbers."""

    here: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, here: Tensor, place: torch.device) -> "_Elsewhere":
        make: Any = Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]
        made = make(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=CPU,
            dispatch_device=True,
        )
        made.here, made.place = here, place
        return made

    @property
    def device(self) -> torch.device:
        return self.place

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.here!r} on {self.place}"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return CPU if _guarded else args[0].place
        with pretended():
            return func(*args, **(kwargs or {}))


@contextmanager
def pretended() -> Iterator[None]:
    """While active, `FIRST` and `SECOND` are devices as others.  Raises, in the midst of what runs: Mixed."""
    with _Functions(), _Operations():
        yield


def spread(model: Any, layers: Any, on_second: Callable[[int], bool], main: torch.device = FIRST) -> Any:
    """The model as accelerate spreads it: some decoder layers on `SECOND`, everything else on `FIRST`.

    on_second: which layers, by their number. main: where the model takes its inputs.
    """
    path = next(name for name, module in model.named_modules() if module is layers)
    where: dict[str, Any] = dict.fromkeys(_beside(model, path), FIRST)
    where |= {f"{path}.{number}": SECOND if on_second(number) else FIRST for number in range(len(layers))}
    with pretended():
        return dispatch_model(
            model, where, main_device=main, skip_keys=model._skip_keys_device_placement, force_hooks=True
        )


def _beside(module: Any, path: str, name: str = "") -> Iterator[str]:
    """The largest modules without any on the path, by name."""
    here, _, below = path.partition(".")
    for child, part in module.named_children():
        if child != here:
            yield name + child
        elif below:
            yield from _beside(part, below, f"{name}{child}.")


class _Functions(TorchFunctionMode):
    """Sees to what torch does before it dispatches operations."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor:  # which reads numbers off lists of tensors, and makes one undispatched
            device = kwargs.pop("device", None) or CPU
            return func(*map_tensors(_here, args), **kwargs).to(device)
        if func not in _GUARDED:
            return func(*args, **kwargs)
        _guarded.append(func)
        try:
            return func(*args, **kwargs)
        finally:
            _guarded.pop()


class _Operations(TorchDispatchMode):
    """Runs operations on what is here, and says where their results are."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return CPU if _guarded else args[0].place
        if (result := decompose(self, func, args, kwargs)) is not NotImplemented:
            return result
        given = tensors((args, kwargs))
        device = _device(func, args, given)
        if kwargs.get("device") is not None:
            device, kwargs["device"] = torch.device(kwargs["device"]), CPU
        same = {id(one.here): one for one in given if isinstance(one, _Elsewhere)}

        def there(value: Tensor) -> Tensor:
            return same[id(value)] if id(value) in same else _Elsewhere(value, device)

        here, named = map_tensors(_here, (args, kwargs))
        with torch.inference_mode(False), torch.no_grad():  # views of a tensor must be of its kind, wherever it is from
            result = func(*here, **named)
            return result if device == CPU else map_tensors(there, result)


def _here(value: Tensor) -> Tensor:
    return value.here if isinstance(value, _Elsewhere) else value


def _device(func: Any, args: Sequence[Any], given: Sequence[Tensor]) -> torch.device:
    """Where an operation on these tensors runs.  Raises: Mixed."""
    if func is _aten.copy_.default:
        return args[0].device
    if func in _INDEXING:
        waiting = {id(index) for index in args[1] if index is not None and index.device == CPU}
        given = [one for one in given if id(one) not in waiting]
    devices = {one.device for one in given}
    if len(devices) > 1:
        devices = {one.device for one in given if one.ndim or one.device != CPU}
    if len(devices) > 1:
        raise Mixed(f"{func.name()} was given tensors on {', '.join(sorted(map(str, devices)))}")
    return devices.pop() if devices else CPU
