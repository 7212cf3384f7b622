"""Attention masks among the tokens that remain, from the masks of the unpruned model."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fastav.pruning.indexing import TokenSubset


def prefill_mask(mask: Any, rows: TokenSubset, columns: TokenSubset, *, kind: str, dtype: torch.dtype) -> Tensor | None:
    """The mask of a prefill among the kept tokens, from the model's own.

    mask: None (plain causal), [batch or 1, heads or 1, tokens, tokens] (bool, or additive), or [batch, tokens] (flash).
    rows: the queries. columns: the keys; others than the queries where a layer shares an earlier one's.
    kind: `attn_implementation`. Rows that are not real may attend anywhere: nothing reads them, but NaN would spread.
    """
    if "flash" in kind:
        return columns.valid
    if mask is None:
        if rows.slots is columns.slots and rows.valid is None:
            return None
        allowed = rows.slots[:, None, :, None] >= columns.slots[:, None, None]
        if columns.valid is not None:
            allowed = allowed & columns.valid[:, None, None]
        if rows.valid is not None:
            allowed = allowed | ~rows.valid[:, None, :, None]
        return _as_kind(allowed, kind, dtype)
    mask = _columns(_columns(mask, _within(columns, mask)).transpose(-1, -2), _within(rows, mask)).transpose(-1, -2)
    if columns.valid is not None:
        mask = _hide(mask, ~columns.valid[:, None, None])
    if rows.valid is not None:
        mask = mask.masked_fill(~rows.valid[:, None, :, None], True if mask.dtype == torch.bool else 0.0)
    return mask


def last_rows_mask(mask: Any, columns: TokenSubset, total: int, *, kind: str, dtype: torch.dtype) -> Tensor | None:
    """The mask of a prompt's last tokens over what a layer holds, from the model's own rows for them.

    mask: None (of one query only: it sees all), or [batch or 1, heads or 1, queries, total].
    """
    places = columns.slots.clamp(max=total - 1)
    return decode_mask(mask, places, columns.valid, total=total, new=1, kind=kind, dtype=dtype)


def decode_mask(
    mask: Any,
    places: Int[Tensor, "batch stored"],
    valid: Bool[Tensor, "batch stored"] | None,
    *,
    total: int,
    new: int,
    kind: str,
    dtype: torch.dtype,
) -> Tensor | None:
    """The mask of `new` tokens over what a layer stored, from the model's own over the unpruned sequence.

    mask: as for `prefill_mask`, its columns being the last ones of the `total` places of the unpruned sequence.
    """
    if "flash" in kind:
        return valid
    if mask is None:
        if valid is None and new == 1:
            return None
        queries = torch.arange(total - new, total, device=places.device)
        allowed = places[:, None, None] <= queries[None, None, :, None]
        return _as_kind(allowed if valid is None else allowed & valid[:, None, None], kind, dtype)
    column = places - (total - mask.shape[-1])
    mask = _columns(mask, column.clamp(0, mask.shape[-1] - 1))
    hidden = column < 0 if valid is None else (column < 0) | ~valid
    return _hide(mask, hidden[:, None, None])


def _within(kept: TokenSubset, mask: Tensor) -> Int[Tensor, "batch kept"]:
    """Slots that are columns of the mask, also where they stand for no token."""
    return kept.slots if kept.valid is None else kept.slots.clamp(max=mask.shape[-1] - 1)


def _columns(mask: Tensor, index: Tensor) -> Tensor:
    """Columns of a [batch or 1, heads or 1, queries, keys] mask."""
    if index.shape[0] == 1:
        return mask.index_select(-1, index[0])
    mask = mask.expand(index.shape[0], *mask.shape[1:])
    return mask.gather(-1, index[:, None, None].expand(*mask.shape[:-1], index.shape[1]))


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def _as_kind(allowed: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Boolean for kernels that take it; additive for eager attention, which adds what it gets."""
    if kind != "eager":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
