"""Rows of attention maps, from queries and keys: never a whole map."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 29}
"""Of the scores that are held at once: on a CPU what stays in its caches is fastest."""


def last_query_attention(
    query: Float[Tensor, "batch heads tokens features"],
    key: Float[Tensor, "batch kv_heads tokens features"],
    mask: Tensor | None,
    valid: Bool[Tensor, "batch tokens"] | None,
    scaling: float | int,
) -> Float[Tensor, "batch tokens"]:
    """Attention of the last query over all tokens, mean over heads, in float32.  Arguments as for `attention_rows`."""
    return attention_rows(query, key, mask, valid, scaling, first=query.shape[2] - 1)[:, 0]


def attention_rows(
    query: Float[Tensor, "batch heads queries features"],
    key: Float[Tensor, "batch kv_heads tokens features"],
    mask: Tensor | None,
    valid: Bool[Tensor, "batch tokens"] | None,
    scaling: float | int,
    *,
    first: int = 0,
    last: int | None = None,
) -> Float[Tensor, "batch rows tokens"]:
    """Attention of the queries from `first` to before `last` over all tokens, mean over heads, in float32.

    mask: as the attention function gets it: [batch or 1, heads or 1, queries, tokens] (bool, or additive); None, or
    [batch, tokens] (flash), for causal attention, where the queries are those of the last tokens. valid: which tokens
    are real (None: all). Rows of queries that are not real are zero.
    """
    return _of_heads(query, key, mask, valid, scaling, first, query.shape[2] if last is None else last).mean((1, 2))


def weighted_attention(
    weights: Float[Tensor, "batch rows queries"],
    query: Float[Tensor, "batch heads queries features"],
    key: Float[Tensor, "batch kv_heads tokens features"],
    mask: Tensor | None,
    valid: Bool[Tensor, "batch tokens"] | None,
    scaling: float | int,
    *,
    block: int | None = None,
) -> Float[Tensor, "batch rows tokens"]:
    """Rows of weights times the attention map (mean over heads), in float32: `weights @ attention_rows(...)`.

    block: queries whose attention is held at once; by default as many as `BLOCK_BYTES` hold. Where attention is known
    to be causal (no mask of four axes), keys after the block are not looked at.
    """
    batch, heads, queries, _ = query.shape
    tokens, rows = key.shape[2], weights.shape[1]
    block = block or max(1, BLOCK_BYTES.get(query.device.type, 1 << 26) // (4 * batch * heads * tokens))
    causal = mask is None or mask.ndim != 4
    total = torch.zeros(batch, rows, tokens, device=query.device)
    for first in range(0, queries, block):
        last = min(first + block, queries)
        seen = tokens - queries + last if causal else tokens
        real = None if valid is None else valid[:, :seen]
        if causal:
            attention = _of_heads(query[:, :, first:last], key[:, :, :seen], None, real, scaling, 0, last - first)
        else:
            attention = _of_heads(query, key, mask, real, scaling, first, last)
        # head by head: the fewer terms a sum has, the less it depends on the order in which a kernel adds them
        total[:, :, :seen] += torch.matmul(weights[:, None, None, :, first:last], attention).sum((1, 2))
    return total / heads


def _of_heads(
    query: Float[Tensor, "batch heads queries features"],
    key: Float[Tensor, "batch kv_heads tokens features"],
    mask: Tensor | None,
    valid: Bool[Tensor, "batch tokens"] | None,
    scaling: float | int,
    first: int,
    last: int,
) -> Float[Tensor, "batch kv_heads groups rows tokens"]:
    queries, tokens = query.shape[2], key.shape[2]
    batch, heads, _, features = query.shape
    kv_heads, rows = key.shape[1], last - first
    grouped = query[:, :, first:last].reshape(batch, kv_heads, heads // kv_heads * rows, features)
    logits = torch.matmul(grouped, key.transpose(-1, -2)).float() * scaling
    logits = logits.view(batch, kv_heads, heads // kv_heads, rows, tokens)
    if mask is not None and mask.ndim == 4:
        seen = mask[:, :, first:last]
        groups = 1 if seen.shape[1] == 1 else heads // kv_heads
        seen = seen.reshape(seen.shape[0], -1, groups, rows, tokens)
        logits = logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen.float()
    elif first < queries - 1:
        place = torch.arange(tokens, device=key.device)
        logits = logits.masked_fill(place > place[tokens - queries :][first:last, None], -torch.inf)
    if valid is None:
        return logits.softmax(-1)
    attention = logits.masked_fill(~valid[:, None, None, None], -torch.inf).softmax(-1)
    real = valid[:, tokens - queries :][:, first:last]
    return torch.where(real[:, None, None, :, None], attention, 0.0)


def one_query_attention(
    query: Float[Tensor, "batch heads 1 features"],
    key: Float[Tensor, "batch kv_heads tokens features"],
    value: Float[Tensor, "batch kv_heads tokens value_features"],
    seen: Bool[Tensor, "batch 1 1 tokens"] | None,
    scaling: float | int | None,
) -> Float[Tensor, "batch heads 1 value_features"]:
    """Attention of one query per head over the tokens that are `seen` (None: all).

    The heads that share keys (GQA) go as queries of one head, so that keys and values are read once and not repeated.
    scaling: of the logits; None for that of the head's size.
    """
    groups = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    mixed = torch.nn.functional.scaled_dot_product_attention(groups, key, value, attn_mask=seen, scale=scaling)
    return mixed.reshape(*query.shape[:3], value.shape[3])
