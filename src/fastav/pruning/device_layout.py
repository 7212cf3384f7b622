"""Layouts and the counts of every cut as tensors, copied to the device in few transfers before a prefill."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fastav.layout import MEDIA, Layout, Modality
from fastav.method import BatchLayout
from fastav.plan import Plan
from fastav.transfer import upload

Pools = tuple[frozenset[Modality], ...]


class CutCounts(NamedTuple):
    """The numbers of tokens that a cut keeps in each row.

    limits: of each pool; then of tokens in no pool, which are all kept, and of columns without a token, which are all
    dropped. most: the largest number of each pool in a row. width: tokens of the longest row after the cut. ragged:
    whether another row is shorter.
    """

    pools: Pools
    limits: Int[Tensor, "batch groups"]
    most: tuple[int, ...]
    width: int
    ragged: bool


def batch_layout(layouts: Sequence[Layout], length: int, device: torch.device) -> BatchLayout:
    """Layouts as tensors of `length` columns, left-padded, and one more column of modality -1."""
    planes = np.zeros((7, len(layouts), length + 1), np.int64)
    planes[:2] = -1
    seconds = np.full((2, len(layouts), length + 1), np.nan, np.float32)
    fields: tuple[Callable[[Layout], np.ndarray], ...] = (
        lambda layout: layout.modality,
        lambda layout: layout.item,
        lambda layout: np.arange(len(layout)),
        lambda layout: layout.padding,
        lambda layout: layout.frame,
        _places,
        question_mask,
    )
    for row, layout in enumerate(layouts):
        for plane, read in zip(planes, fields, strict=True):
            plane[row, length - len(layout) : length] = read(layout)
        seconds[0, row, length - len(layout) : length] = layout.second
        seconds[1, row, length - len(layout) : length] = _last_seconds(layout)
    second, last_second = upload(seconds, device)
    modality, item, position, padding, frame, place, question = upload(planes, device)
    return BatchLayout(
        modality=modality,
        item=item,
        position=position,
        padding=padding.bool(),
        frame=frame,
        place=place,
        second=second,
        last_second=last_second,
        question=question.bool(),
        layouts=tuple(layouts),
    )


def question_mask(layout: Layout) -> np.ndarray:
    """Whether each token is text behind the last audio or video token, or the prompt's last token."""
    media = np.isin(layout.modality, MEDIA)
    question = np.cumsum(media[::-1])[::-1] == 0
    question[-1:] = True
    return question


def _places(layout: Layout) -> np.ndarray:
    """The number of earlier tokens of the same modality, item and frame, per token."""
    keys = (layout.frame, layout.item, layout.modality)
    order = np.lexsort((np.arange(len(layout)), *keys))
    is_first = np.ones(len(layout), bool)
    is_first[1:] = np.any([np.diff(key[order]) != 0 for key in keys], axis=0)
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(layout)), 0))
    places = np.empty(len(layout), np.int64)
    places[order] = np.arange(len(layout)) - starts
    return places


def _last_seconds(layout: Layout) -> np.ndarray:
    """The largest second of each token's item; NaN if all are unknown."""
    last = np.full(layout.items + 1, -np.inf, np.float32)  # the last entry is that of text
    np.maximum.at(last, layout.item, np.nan_to_num(layout.second, nan=-np.inf))
    return np.where(np.isfinite(last), last, np.nan)[layout.item]


def cut_counts(plan: Plan, layouts: Sequence[Layout], depth: int, device: torch.device) -> list[CutCounts]:
    """The counts of every cut: first the cuts of tokens, then those of caches alone.  Raises: PlanError."""
    has_cache_cuts = any(step.cache_only for step in plan.steps)
    schedules = {id(layout): plan.schedule(layout, depth) for layout in layouts}
    if has_cache_cuts:
        schedules = {id(layout): schedules[id(layout)] + plan.cache_schedule(layout, depth) for layout in layouts}
    cuts = list(zip(*(schedules[id(layout)] for layout in layouts), strict=True))
    pools = [tuple(rows[0].counts) for rows in cuts]
    limits = [
        [[*cut.counts.values(), len(layout), 0] for cut, layout in zip(rows, layouts, strict=True)] for rows in cuts
    ]
    flat = np.concatenate([np.zeros((len(layouts), 0), np.int64), *limits], axis=1, dtype=np.int64)
    limits_by_cut = torch.split(upload(flat, device), [len(pool) + 2 for pool in pools], dim=1)
    mosts = [[max(cut.counts[one] for cut in rows) for one in pool] for rows, pool in zip(cuts, pools, strict=True)]
    totals = [[cut.total for cut in rows] for rows in cuts]
    return [
        CutCounts(pool, limit, tuple(most), max(total), min(total) < max(total))
        for pool, limit, most, total in zip(pools, limits_by_cut, mosts, totals, strict=True)
    ]
