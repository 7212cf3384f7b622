"""The devices that a model runs on, also where accelerate's hooks move its weights to them at every forward.

The `_hf_hook` of accelerate on a module names the device that the module and its submodules run on, except submodules
with a hook of their own. Parameters of offloaded modules are on `meta` between their forwards.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def running_on(model: nn.Module) -> tuple[torch.device, ...]:
    """The devices that a model runs on, each once, in the order of its modules."""
    return tuple(dict.fromkeys(_devices(model)))


def input_device(model: Any) -> torch.device:
    """The device for a model's inputs: the one that uses its first weights."""
    return next(_devices(model), model.device)


def is_dispatched(model: nn.Module) -> bool:
    """Whether hooks of accelerate move weights and inputs of a model's modules to their devices at every forward."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


@contextmanager
def ready_to_run(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Yield a module's arguments on the device that it runs on, with its own weights there, as in its forward."""
    if (hook := getattr(module, "_hf_hook", None)) is None:
        yield args, kwargs
        return
    arguments = hook.pre_forward(module, *args, **kwargs)
    try:
        yield arguments
    finally:
        hook.post_forward(module, None)


def forward_without_hook(module: nn.Module) -> Callable[..., Any]:
    """A module's forward without accelerate's hook on the module itself; `ready_to_run` does what the hook does."""
    return getattr(module, "_old_forward", module.forward) if hasattr(module, "_hf_hook") else module.forward


def undo_hook(module: nn.Module) -> None:
    """Undo what accelerate's hook on a module did before a forward that an exception has ended."""
    if (hook := getattr(module, "_hf_hook", None)) is not None:
        hook.post_forward(module, None)


def _devices(model: nn.Module) -> Iterator[torch.device]:
    """The device that uses each parameter."""
    if is_dispatched(model):
        yield from _dispatched(model, None)
    else:
        yield from (parameter.device for parameter in model.parameters())


def _dispatched(module: nn.Module, inherited: torch.device | None) -> Iterator[torch.device]:
    target = _execution_device(getattr(module, "_hf_hook", None)) or inherited
    for parameter in module.parameters(recurse=False):
        yield target or parameter.device
    for child in module.children():
        yield from _dispatched(child, target)


def _execution_device(hook: Any) -> torch.device | None:
    """The device that a hook of accelerate names; of several hooks, the last that names one."""
    for part in reversed(getattr(hook, "hooks", (hook,))):
        if (device := getattr(part, "execution_device", None)) is not None:
            device = torch.device(device)
            return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
    return None
