"""The tensors among an operation's arguments and results, found faster than `torch.utils._pytree` finds them.

Tests that watch every operation of a model spend most of their time on that.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map_only

_whole: set[OpOverload] = set()  # operations that are not made of others


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with each of its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    kind = type(value)
    if kind is tuple:
        return tuple([map_tensors(change, part) for part in value])
    if kind is list:
        return [map_tensors(change, part) for part in value]
    if kind is dict:
        return {name: map_tensors(change, part) for name, part in value.items()}
    return tree_map_only(Tensor, change, value) if isinstance(value, tuple | list | dict) else value


def decompose(mode: Any, func: OpOverload, args: Any, kwargs: Any) -> Any:
    """The result of an operation that is made of others, which run under the mode; else NotImplemented.

    Inference mode leaves such operations whole.
    """
    if func in _whole:
        return NotImplemented
    with mode:
        result = func.decompose(*args, **kwargs)
    if result is NotImplemented:
        _whole.add(func)
    return result


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
        return
    kind = type(value)
    if kind is tuple or kind is list:
        for part in value:
            _collect(part, found)
    elif kind is dict:
        for part in value.values():
            _collect(part, found)
    elif isinstance(value, tuple | list | dict):
        found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
