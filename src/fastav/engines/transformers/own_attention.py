"""The attention of a layer that is about to run: its queries and keys, without the attention itself and the MLP.

The layer's own code runs up to its attention call, so norms, projections and RoPE are the model's, whatever the family.
It is called without the hooks on the layer. Those on its parts, such as `q_proj`, see the call.
"""

from collections.abc import Mapping
from threading import get_ident
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastav.engines.transformers.attention_hooks import observe_attention
from fastav.engines.transformers.devices import forward_without_hook, ready_to_run, undo_hook
from fastav.engines.transformers.wrapped import unwrapped
from fastav.errors import UnsupportedModel


class AttentionInputs(NamedTuple):
    """What a layer passes to its attention: queries and keys after norms and RoPE, its mask, and the scaling."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float


class _AttentionReached(Exception):
    """Ends a forward at its attention call."""


def attention_inputs(
    layer: nn.Module, attention: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]
) -> AttentionInputs:
    """The inputs of a layer's attention on these hidden states.

    layer: may be wrapped, by `torch.compile` or checkpointing; what is inside runs as it stands. attention: its part.
    arguments: of the layer, without hidden states; a cache among them is changed.
    Raises: UnsupportedModel if the attention is not called by transformers' interface.
    """
    inner, thread = unwrapped(layer), get_ident()
    reached: list[AttentionInputs] = []

    def stop(*inputs: Any) -> None:
        if get_ident() == thread:  # other threads may run the same layer
            reached.append(AttentionInputs(*inputs))
            raise _AttentionReached

    with observe_attention(attention, stop), ready_to_run(inner, (hidden,), arguments) as (args, kwargs):
        try:
            forward_without_hook(inner)(*args, **kwargs)
        except _AttentionReached:
            undo_hook(attention)
    if not reached:
        raise UnsupportedModel(
            f"{type(attention).__name__} does not call its attention by transformers' interface, so its scores cannot "
            "be computed",
            "choose a method that reads the preceding layer",
        )
    return reached[0]
