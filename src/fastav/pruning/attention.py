"""Rows of attention maps, from queries and keys, without a full map."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 29}
"""Bytes of scores in memory at once, by device type; on a CPU, blocks that fit its caches are fastest."""


def last_query_attention(
    query: Float[Tensor, "batch heads queries features"],
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

    mask: the mask of the attention function: [batch or 1, heads or 1, queries, tokens] (bool, or additive); None, or
    [batch, tokens] (flash), for causal attention, where the queries are those of the last tokens. valid: which tokens
    are real (None: all). Rows of queries that are not real are zero.
    """
    end = query.shape[2] if last is None else last
    return _head_attention(query, key, mask, valid, scaling, first, end).mean((1, 2))


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

    block: number of queries whose attention is in memory at once; by default as many as fit in `BLOCK_BYTES`. If
    attention is known to be causal (no mask of four axes), keys after a block are skipped.
    """
    batch, heads, queries, _ = query.shape
    tokens, rows = key.shape[2], weights.shape[1]
    block = block or max(1, BLOCK_BYTES.get(query.device.type, 1 << 26) // (4 * batch * heads * tokens))
    causal = mask is None or mask.ndim != 4
    total = torch.zeros(batch, rows, tokens, device=query.device)
    for first in range(0, queries, block):
        last = min(first + block, queries)
        n_visible = tokens - queries + last if causal else tokens
        visible_valid = None if valid is None else valid[:, :n_visible]
        if causal:
            attention = _head_attention(
                query[:, :, first:last], key[:, :, :n_visible], None, visible_valid, scaling, 0, last - first
            )
        else:
            attention = _head_attention(query, key, mask, visible_valid, scaling, first, last)
        # head by head: the fewer terms a sum has, the less it depends on the order in which a kernel adds them
        total[:, :, :n_visible] += torch.matmul(weights[:, None, None, :, first:last], attention).sum((1, 2))
    return total / heads


def _head_attention(
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
        mask = mask[:, :, first:last]
        groups = 1 if mask.shape[1] == 1 else heads // kv_heads
        mask = mask.reshape(mask.shape[0], -1, groups, rows, tokens)
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    elif first < queries - 1:
        column = torch.arange(tokens, device=key.device)
        logits = logits.masked_fill(column > column[tokens - queries :][first:last, None], -torch.inf)
    if valid is None:
        return logits.softmax(-1)
    attention = logits.masked_fill(~valid[:, None, None, None], -torch.inf).softmax(-1)
    valid_rows = valid[:, tokens - queries :][:, first:last]
    return torch.where(valid_rows[:, None, None, :, None], attention, 0.0)


def one_query_attention(
    query: Float[Tensor, "batch heads 1 features"],
    key: Float[Tensor, "batch kv_heads tokens features"],
    value: Float[Tensor, "batch kv_heads tokens value_features"],
    visible: Bool[Tensor, "batch 1 1 tokens"] | None,
    scaling: float | int | None,
) -> Float[Tensor, "batch heads 1 value_features"]:
    """Attention of one query per head over the `visible` tokens (None: all).

    Heads that share keys (GQA) are passed as queries of one head, so that keys and values are read once instead of
    repeated. scaling: of the logits; None for the default of the head size.
    """
    groups = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    output = torch.nn.functional.scaled_dot_product_attention(groups, key, value, attn_mask=visible, scale=scaling)
    return output.reshape(*query.shape[:3], value.shape[3])
