"""Attention rollout: how much a token contributes to another through all layers, in blocks of queries.

`R_l = A~_l ... A~_1` with `A~ = alpha * A + (1 - alpha) * I`, where A is a layer's attention, mean over heads. Only few
rows of R (or means of rows) are needed, so row vectors are multiplied layer by layer, from the top:
`v <- alpha * v A + (1 - alpha) * v`. Memory: a block of rows of A besides the queries and keys. FLOPs: the attention
scores of all layers, once, for any number of rows and top layers.

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

    slots, key_slots: columns in the padded prompt of the query tokens and of the key tokens (in most models the same).
    Other fields: as for `attention_rows`.
    """

    query: Float[Tensor, "batch heads queries features"]
    key: Float[Tensor, "batch kv_heads tokens features"]
    mask: Tensor | None
    scaling: float | int
    slots: Int[Tensor, "batch queries"]
    key_slots: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"] | None

    def to(self, device: torch.device | str) -> "LayerAttention":
        """Move all tensors to another device, such as the host, to record many layers of a long prompt."""
        return self._replace(
            query=self.query.to(device),
            key=self.key.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            slots=self.slots.to(device),
            key_slots=self.key_slots.to(device),
            valid=None if self.valid is None else self.valid.to(device),
        )


class RolloutRows(NamedTuple):
    """Products of row vectors with the attention of each layer, and with the rollout up to that layer."""

    attention: Float[Tensor, "layers batch rows columns"]
    rollout: Float[Tensor, "layers batch rows columns"]


def rollout_row(
    layers: Sequence[LayerAttention],
    start: Float[Tensor, "batch columns"],
    *,
    alpha: float = ALPHA,
    block: int | None = None,
) -> Float[Tensor, "batch columns"]:
    """A row vector times the rollout of these layers, in the order in which they ran.

    start, and the result: a weight for each column of the padded prompt, and for one more column, to which slots point
    that stand for no token. Layers that ran on fewer tokens leave the weights of dropped tokens unchanged. A one-hot
    vector at the last token gives the last query's row of R. Layers may be on several devices; the row moves to each.
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
    """Row vectors times A_l and times R_l, for every layer l, in one pass from the top.

    starts: several row vectors, each as `start` of `rollout_row`; for a layer that ran on fewer tokens, the weights of
    those tokens are normalised to sum 1. Results are on the device of `starts`, to which layers on other devices are
    moved one at a time.
    """
    attention: list[Tensor] = []
    weights = starts[:, :0]
    for recorded in reversed(layers):
        layer = recorded.to(starts.device)
        layer_starts = torch.zeros_like(starts[:, :1]).scatter(2, layer.slots[:, None], 1.0) * starts
        layer_starts = layer_starts / layer_starts.sum(2, keepdim=True).clamp(min=1e-30)
        weights, product = _through(layer, torch.cat([layer_starts, weights], 1), alpha, block)
        attention.append(product[:, : starts.shape[1]])
    rollout = weights.reshape(len(weights), len(layers), -1, weights.shape[2]).transpose(0, 1)
    return RolloutRows(torch.stack(attention[::-1]), rollout)


def _through(
    layer: LayerAttention, weights: Float[Tensor, "batch rows columns"], alpha: float, block: int | None
) -> tuple[Float[Tensor, "batch rows columns"], Float[Tensor, "batch rows columns"]]:
    """Rows times A~ of one layer, and times its A."""
    slots, key_slots = (part[:, None].expand(-1, weights.shape[1], -1) for part in (layer.slots, layer.key_slots))
    query_weights = weights.gather(2, slots)
    rows = weighted_attention(
        query_weights, layer.query, layer.key, layer.mask, layer.valid, layer.scaling, block=block
    )
    product = torch.zeros_like(weights).scatter_add(2, key_slots, rows)
    return weights.scatter(2, slots, (1 - alpha) * query_weights) + alpha * product, product
