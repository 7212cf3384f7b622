"""Rows of attention maps, from queries and keys: never a whole map."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
    queries, tokens = query.shape[2], key.shape[2]
    last = queries if last is None else last
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
        return logits.softmax(-1).mean((1, 2))
    attention = logits.masked_fill(~valid[:, None, None, None], -torch.inf).softmax(-1).mean((1, 2))
    real = valid[:, tokens - queries :][:, first:last]
    return torch.where(real[..., None], attention, 0.0)
