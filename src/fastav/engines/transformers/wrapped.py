"""Seeing through what wraps models (PEFT, DDP) and decoder layers (`torch.compile(layer)`, checkpointing)."""

import sys
from inspect import signature
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

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


def base_model(model: Any) -> Any:
    """The model inside what PEFT and `DistributedDataParallel` wrap around it, which run it as it is.

    Raises: UnsupportedModel for PEFT methods that put tokens of their own before the prompt.
    """
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif _is_of_peft(model):
            if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
                raise UnsupportedModel(
                    "prompt tuning puts tokens before the prompt, which its layout does not hold",
                    "take an adapter that changes weights, as LoRA does",
                )
            model = model.base_model.model
        else:
            return model


def _is_of_peft(model: Any) -> bool:
    """Without loading PEFT: who has such a model has loaded it."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))
