"""Norms and MLPs of decoder layers under `torch.compile`.

They are functions of hidden states alone, with the same code in every layer, so that one compilation with dynamic sizes
serves all layers, prefills of any length, and every decoding step. Attention is not compiled: it contains its layer's
number, so that each layer would compile separately, and engines observe it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastav.engines.transformers.wrapped import unwrapped

KINDS = ("RMSNorm", "MLP")  # ends of the names of their classes


@contextmanager
def compiled(decoder: Any) -> Iterator[None]:
    """Run the norms and MLPs of a decoder compiled, while the context lasts.  The first forward compiles them.

    Results differ from uncompiled ones in their last digits.
    """
    before = [(module, module._compiled_call_impl) for module in _modules(decoder)]
    for module, _ in before:
        module.compile(dynamic=True)
    try:
        yield
    finally:
        for module, original in before:
            module._compiled_call_impl = original


def is_compiled(decoder: Any) -> bool:
    """Whether some norm or MLP of a decoder runs compiled."""
    return any(module._compiled_call_impl is not None for module in _modules(decoder))


def _modules(decoder: Any) -> list[nn.Module]:
    return [
        module
        for layer in decoder.layers
        for module in unwrapped(layer).children()
        if type(module).__name__.endswith(KINDS)
    ]
