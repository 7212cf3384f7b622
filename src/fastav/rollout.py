"""Attention rollout: how much of a token reaches another through all layers, in blocks of queries.

`R_L = A~_L ... A~_1` with `A~ = alpha * A + (1 - alpha) * I`, where A is a layer's attention, mean over heads. Of R
only one row is wanted, so a row vector goes down from the top layer: `v <- alpha * v A + (1 - alpha) * v`. Memory is
that of a block of rows of A; FLOPs are those of the attention scores of all layers.

Source: Abnar and Zuidema, arXiv:2005.00928; arXiv:2601.13143, section 3 (alpha is not given there; 0.5 is usual).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastav.attention import attention_rows

ALPHA = 0.5
BLOCK = 256  # queries whose attention is held at once


class Captured(NamedTuple):
    """What one layer's attention was given.

    slots: column of the padded prompt of each token that the layer ran on. Others as for `attention_rows`.
    """

    query: Float[Tensor, "batch heads tokens features"]
    key: Float[Tensor, "batch kv_heads tokens features"]
    mask: Tensor | None
    scaling: float | int
    slots: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"] | None


def rollout_row(
    layers: Sequence[Captured], start: Float[Tensor, "batch columns"], *, alpha: float = ALPHA, block: int = BLOCK
) -> Float[Tensor, "batch columns"]:
    """A row vector times the rollout of these layers, the first of which ran first.

    start, and what is returned: a weight for each column of the padded prompt (and one more column, to which slots
    point that stand for no token). Layers that ran on fewer tokens pass the weight of those on; one-hot at the last
    token gives the last query's row of R.
    """
    weights = start
    for layer in reversed(layers):
        here = weights.gather(1, layer.slots)
        mixed = alpha * _times_attention(here, layer, block) + (1 - alpha) * here
        weights = torch.zeros_like(start).scatter_(1, layer.slots, mixed)
    return weights


def _times_attention(
    weights: Float[Tensor, "batch tokens"], layer: Captured, block: int
) -> Float[Tensor, "batch tokens"]:
    total = torch.zeros_like(weights)
    for first in range(0, weights.shape[1], block):
        last = min(first + block, weights.shape[1])
        rows = attention_rows(layer.query, layer.key, layer.mask, layer.valid, layer.scaling, first=first, last=last)
        total += torch.einsum("bq,bqt->bt", weights[:, first:last], rows)
    return total
