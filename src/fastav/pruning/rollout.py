"""Attention rollout: how much of a token reaches another through all layers, in blocks of queries.

`R_l = A~_l ... A~_1` with `A~ = alpha * A + (1 - alpha) * I`, where A is a layer's attention, mean over heads. Of R
only few rows (or means of rows) are wanted, so row vectors go down from the top layer:
`v <- alpha * v A + (1 - alpha) * v`. Memory is that of a block of rows of A beside the queries and keys; FLOPs are
those of the attention scores of all layers, once, however many rows and top layers are asked for.

Source: Abnar and Zuidema, arXiv:2005.00928; arXiv:2601.13143, section 3 (alpha is not given there; 0.5 is usual).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastav.pruning.attention import weighted_attention

ALPHA = 0.5


class LayerAttention(NamedTuple):
    """The inputs of one layer's attention.

    slots, key_slots: columns of the padded prompt of the queries' and of the keys' tokens (in most models the same).
    Others as for `attention_rows`.
    """

    query: Float[Tensor, "batch heads queries features"]
    key: Float[Tensor, "batch kv_heads tokens features"]
    mask: Tensor | None
    scaling: float | int
    slots: Int[Tensor, "batch queries"]
    key_slots: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"] | None

    def to(self, device: torch.device | str) -> "LayerAttention":
        """The same on another device; to hold many layers of a long prompt, beside the model on the host."""
        moved = (part.to(device) if isinstance(part, Tensor) else part for part in self)
        return LayerAttention(*moved)  # pyright: ignore[reportArgumentType]


class RolloutRows(NamedTuple):
    """Row vectors times the attention of each layer, and times the rollout of that layer and all before it."""

    attention: Float[Tensor, "layers batch rows columns"]
    rollout: Float[Tensor, "layers batch rows columns"]


def rollout_row(
    layers: Sequence[LayerAttention],
    start: Float[Tensor, "batch columns"],
    *,
    alpha: float = ALPHA,
    block: int | None = None,
) -> Float[Tensor, "batch columns"]:
    """A row vector times the rollout of these layers, the first of which ran first.

    start, and what is returned: a weight for each column of the padded prompt (and one more column, to which slots
    point that stand for no token). Layers that ran on fewer tokens pass the weight of those on; one-hot at the last
    token gives the last query's row of R. Layers may be on several devices: the row goes to each, and back.
    """
    weights = start[:, None]
    for layer in reversed(layers):
        weights, _ = _through(layer, weights.to(layer.query.device), alpha, block)
    return weights[:, 0].to(start.device)


def rollout_rows(
    layers: Sequence[LayerAttention],
    starts: Float[Tensor, "batch rows columns"],
    *,
    alpha: float = ALPHA,
    block: int | None = None,
) -> RolloutRows:
    """Row vectors times A_l and times R_l, of every layer l, in one pass down.

    starts: as `start` of `rollout_row`, several of them; of a layer that ran on fewer tokens, the weights of those are
    made to sum to 1. Results are on its device, to which layers held elsewhere are brought one at a time.
    """
    attention, weights = [], starts[:, :0]
    for layer in reversed(layers):
        here = layer.to(starts.device)
        own = torch.zeros_like(starts[:, :1]).scatter(2, here.slots[:, None], 1.0) * starts
        own = own / own.sum(2, keepdim=True).clamp(min=1e-30)
        weights, attended = _through(here, torch.cat([own, weights], 1), alpha, block)
        attention.append(attended[:, : starts.shape[1]])
    return RolloutRows(torch.stack(attention[::-1]), weights.unflatten(1, (len(layers), -1)).transpose(0, 1))


def _through(
    layer: LayerAttention, weights: Float[Tensor, "batch rows columns"], alpha: float, block: int | None
) -> tuple[Float[Tensor, "batch rows columns"], Float[Tensor, "batch rows columns"]]:
    """Rows times A~ of one layer, and times its A."""
    slots, keys = (part[:, None].expand(-1, weights.shape[1], -1) for part in (layer.slots, layer.key_slots))
    here = weights.gather(2, slots)
    rows = weighted_attention(here, layer.query, layer.key, layer.mask, layer.valid, layer.scaling, block=block)
    attended = torch.zeros_like(weights).scatter_add(2, keys, rows)
    return weights.scatter(2, slots, (1 - alpha) * here) + alpha * attended, attended
