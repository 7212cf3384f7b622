"""On which devices a model runs, wherever its weights wait: accelerate's hooks bring offloaded or spread ones there.

Its `_hf_hook` on a module names the device that the module runs on; on what lies below that says nothing of its own,
the same device holds. Parameters of offloaded modules are on `meta` between their forwards.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def running_on(model: nn.Module) -> tuple[torch.device, ...]:
    """The devices that a model runs on; each once, in the order of its modules."""
    return tuple(dict.fromkeys(_devices(model)))


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs: where its first weights are used."""
    return next(_devices(model), model.device)


def is_dispatched(model: nn.Module) -> bool:
    """Whether something brings weights and inputs of a model's modules to their devices at every forward."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


@contextmanager
def ready_to_run(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """While active, a module's own weights are where it runs, as in its forward.  Gives its arguments there."""
    if (hook := getattr(module, "_hf_hook", None)) is None:
        yield args, kwargs
        return
    placed = hook.pre_forward(module, *args, **kwargs)
    try:
        yield placed
    finally:
        hook.post_forward(module, None)


def _devices(model: nn.Module) -> Iterator[torch.device]:
    """Where each parameter is used."""
    if is_dispatched(model):
        yield from _dispatched(model, None)
    else:
        yield from (parameter.device for parameter in model.parameters())


def _dispatched(module: nn.Module, inherited: torch.device | None) -> Iterator[torch.device]:
    named = _named_by(getattr(module, "_hf_hook", None)) or inherited
    for parameter in module.parameters(recurse=False):
        yield named or parameter.device
    for child in module.children():
        yield from _dispatched(child, named)


def _named_by(hook: Any) -> torch.device | None:
    """The device that a hook of accelerate, or the last of several that do, names."""
    for one in reversed(getattr(hook, "hooks", (hook,))):
        if (device := getattr(one, "execution_device", None)) is not None:
            device = torch.device(device)
            return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
    return None
