"""Attention masks of the remaining tokens, derived from the masks of the unpruned model."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fastav.pruning.indexing import TokenSubset


def prefill_mask(
    mask: Any, rows: TokenSubset, columns: TokenSubset, *, past: int = 0, kind: str, dtype: torch.dtype
) -> Tensor | None:
    """The mask of the remaining tokens in a prefill, from the model's own mask.

    mask: None (plain causal), [batch or 1, heads or 1, tokens, tokens] (bool, or additive), or [batch, tokens] (flash);
    its columns are the last ones of the unpruned sequence. rows: the queries, by column of the prompt. columns: the
    keys, by column of the sequence; they differ from the queries if a cache holds others, or if a layer shares an
    earlier layer's keys. past: number of columns before the prompt. kind: `attn_implementation`. Rows that are not real
    may attend to any token: nothing reads them, but a row without any key would give NaN, which spreads.
    """
    if "flash" in kind:
        return columns.valid
    if mask is None:
        if rows.slots is columns.slots and rows.valid is None:
            return None
        allowed = rows.slots[:, None, :, None] + past >= columns.slots[:, None, None]
        if columns.valid is not None:
            allowed = allowed & columns.valid[:, None, None]
        if rows.valid is not None:
            allowed = allowed | ~rows.valid[:, None, :, None]
        return _as_kind(allowed, kind, dtype)
    column = columns.slots - (past + mask.shape[-2] - mask.shape[-1])
    mask = _columns(mask.transpose(-1, -2), rows.slots.clamp(max=mask.shape[-2] - 1)).transpose(-1, -2)
    mask = _columns(mask, column.clamp(0, mask.shape[-1] - 1))
    hidden = column < 0 if past else None
    if columns.valid is not None:
        hidden = ~columns.valid if hidden is None else hidden | ~columns.valid
    if hidden is not None:
        mask = _hide(mask, hidden[:, None, None])
    if rows.valid is not None:
        mask = mask.masked_fill(~rows.valid[:, None, :, None], True if mask.dtype == torch.bool else 0.0)
    return mask


def last_rows_mask(mask: Any, columns: TokenSubset, total: int, *, kind: str, dtype: torch.dtype) -> Tensor | None:
    """The mask of a prompt's last tokens over a layer's stored tokens, from the model's own rows for them.

    mask: None (for one query, which sees all), or [batch or 1, heads or 1, queries, total].
    """
    positions = columns.slots.clamp(max=total - 1)
    return decode_mask(mask, positions, columns.valid, total=total, n_new=1, kind=kind, dtype=dtype)


def decode_mask(
    mask: Any,
    positions: Int[Tensor, "batch stored"],
    valid: Bool[Tensor, "batch stored"] | None,
    *,
    total: int,
    n_new: int,
    kind: str,
    dtype: torch.dtype,
) -> Tensor | None:
    """The mask of `n_new` tokens over a layer's stored tokens, from the model's own mask of the unpruned sequence.

    mask: as for `prefill_mask`; its columns are the last ones of the `total` positions of the unpruned sequence.
    """
    if "flash" in kind:
        if mask is None:
            return valid
        real = mask.bool().gather(1, positions.clamp(max=total - 1))
        return real if valid is None else real & valid
    if mask is None:
        if valid is None and n_new == 1:
            return None
        queries = torch.arange(total - n_new, total, device=positions.device)
        allowed = positions[:, None, None] <= queries[None, None, :, None]
        return _as_kind(allowed if valid is None else allowed & valid[:, None, None], kind, dtype)
    column = positions - (total - mask.shape[-1])
    mask = _columns(mask, column.clamp(0, mask.shape[-1] - 1))
    hidden = column < 0 if valid is None else (column < 0) | ~valid
    return _hide(mask, hidden[:, None, None])


def _columns(mask: Tensor, index: Tensor) -> Tensor:
    """Columns of a [batch or 1, heads or 1, queries, keys] mask."""
    if index.shape[0] == 1:
        return mask.index_select(-1, index[0])
    mask = mask.expand(index.shape[0], *mask.shape[1:])
    return mask.gather(-1, index[:, None, None].expand(*mask.shape[:-1], index.shape[1]))


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def _as_kind(allowed: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """A boolean mask for kernels that take one; an additive mask for eager attention."""
    if kind != "eager":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
