"""Seeing through what wraps decoder layers: `torch.compile(layer)`, activation checkpointing, hooks of accelerate."""

from inspect import signature
from typing import Any

from torch import nn

from fastav.errors import UnsupportedModel

HIDDEN = "hidden_states"  # what transformers calls a layer's first argument


def unwrapped(layer: nn.Module) -> nn.Module:
    """The decoder layer itself, whose `forward` names its arguments.

    A wrapper names none of them and holds the layer as its only child.
    Raises: UnsupportedModel if there is none.
    """
    inner = layer
    while HIDDEN not in signature(inner.forward).parameters:
        children = list(inner.children())
        if len(children) != 1:
            raise UnsupportedModel(
                f"{type(layer).__name__} takes no {HIDDEN}, so it is no decoder layer that can be pruned",
                "pass the model without what wraps its layers",
            )
        inner = children[0]
    return inner


def parameters_of(layer: nn.Module) -> tuple[str, ...]:
    """The names of a decoder layer's arguments, whatever wraps it."""
    return tuple(signature(unwrapped(layer).forward).parameters)


def attention_of(layer: nn.Module) -> Any:
    """A decoder layer's attention, whatever wraps the layer; None if it has no `self_attn`."""
    return getattr(unwrapped(layer), "self_attn", None)
