"""Unwrapping of models (PEFT, DDP) and of decoder layers (`torch.compile(layer)`, checkpointing)."""

import sys
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastav.errors import UnsupportedModel

HIDDEN = "hidden_states"  # the name of a layer's first argument in transformers


def unwrapped(layer: nn.Module) -> nn.Module:
    """The decoder layer inside its wrappers.

    The layer's own `forward` names its arguments; a wrapper names none, and has the layer as its only child.
    Raises: UnsupportedModel if there is no such layer.
    """
    inner = layer
    while HIDDEN not in signature(inner.forward).parameters:
        children = list(inner.children())
        if len(children) != 1:
            raise UnsupportedModel(
                f"{type(layer).__name__} takes no {HIDDEN}, so it is not a decoder layer that can be pruned",
                "pass the model without wrappers around its layers",
            )
        inner = children[0]
    return inner


def parameters_of(layer: nn.Module) -> tuple[str, ...]:
    """The names of a decoder layer's arguments, inside any wrapper."""
    return tuple(signature(unwrapped(layer).forward).parameters)


def attention_of(layer: nn.Module) -> Any:
    """A decoder layer's attention, inside any wrapper; None if the layer has no `self_attn`."""
    return getattr(unwrapped(layer), "self_attn", None)


def base_model(model: Any) -> Any:
    """The model inside the wrappers of PEFT and `DistributedDataParallel`, which run it unchanged.

    Raises: UnsupportedModel for PEFT methods that put their own tokens before the prompt.
    """
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif _is_of_peft(model):
            if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
                raise UnsupportedModel(
                    "prompt tuning puts tokens before the prompt, which its layout does not have",
                    "use an adapter that changes weights, such as LoRA",
                )
            model = model.base_model.model
        else:
            return model


def is_quantized(model: nn.Module) -> bool:
    """Whether a model's weights are quantized, by transformers or in place (torchao's `quantize_`)."""
    by_transformers = getattr(model, "hf_quantizer", None) is not None or bool(getattr(model, "is_quantized", False))
    return by_transformers or any(type(parameter.data) is not Tensor for parameter in model.parameters())


def _is_of_peft(model: Any) -> bool:
    """Whether a model is PEFT's, without importing PEFT, which is loaded if there is such a model."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))
