"""The attention that encoders' tokens receive, from queries and keys, in blocks."""

from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Bytes of a block of attention, of which a few are in memory at once, by device type; on a CPU they fit its caches."""


def received_attention(
    query: Float[Tensor, "batch heads tokens head"], key: Float[Tensor, "batch heads tokens head"], scaling: float | int
) -> Float[Tensor, "batch tokens"]:
    """The attention that each token receives: the mean over heads and all queries, in float32."""
    batch, heads, tokens, _ = query.shape
    queries = max(1, BLOCK_BYTES.get(query.device.type, 1 << 26) // (4 * heads * tokens))  # of one block
    sequences = max(1, queries // tokens)
    total = torch.zeros(batch, tokens, device=query.device)
    for row in range(0, batch, sequences):
        rows = slice(row, row + sequences)
        transposed = key[rows].transpose(2, 3)
        for first in range(0, tokens, queries):
            logits = (query[rows, :, first : first + queries] @ transposed).float() * scaling
            total[rows] += logits.softmax(-1).mean(1).sum(1)
    return total / tokens


def sequence_attention(
    query: Float[Tensor, "tokens heads head"],
    key: Float[Tensor, "tokens heads head"],
    lengths: Sequence[int],
    scaling: float | int,
) -> Float[Tensor, " tokens"]:
    """The same of sequences that lie one behind another, each of which attends to itself.

    lengths: tokens of each sequence. Neighbours of the same length are computed together.
    """
    scores, start = [query.new_zeros(0, dtype=torch.float32)], 0
    for length, neighbours in groupby(lengths):
        count = len(list(neighbours))
        end = start + count * length
        queries, keys = (part[start:end].unflatten(0, (count, length)).transpose(1, 2) for part in (query, key))
        scores.append(received_attention(queries, keys, scaling).flatten())
        start = end
    return torch.cat(scores)
