"""Norms and MLPs of decoder layers under `torch.compile`.

They are functions of hidden states alone, and the same code in every layer, so that one compilation with dynamic sizes
serves all layers, the prefill at any number of tokens, and every step. Attention stays as it is: it knows its layer's
number, which would have each layer compiled by itself, and is where engines look on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastav.engines.transformers.wrapped import unwrapped

KINDS = ("RMSNorm", "MLP")  # how their classes' names end


@contextmanager
def compiled(decoder: Any) -> Iterator[None]:
    """While active, these modules of a decoder run compiled.  The first forward compiles, which takes its time.

    Numbers differ from uncompiled ones in their last digits.
    """
    before = [(module, module._compiled_call_impl) for module in _modules(decoder)]
    for module, _ in before:
        module.compile(dynamic=True)
    try:
        yield
    finally:
        for module, plain in before:
            module._compiled_call_impl = plain


def is_compiled(decoder: Any) -> bool:
    """Whether they do now."""
    return any(module._compiled_call_impl is not None for module in _modules(decoder))


def _modules(decoder: Any) -> list[nn.Module]:
    return [
        module
        for layer in decoder.layers
        for module in unwrapped(layer).children()
        if type(module).__name__.endswith(KINDS)
    ]
