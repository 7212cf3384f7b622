"""What a prefill knows before it starts: layouts and the counts of every cut, brought to the device in few copies."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fastav.errors import UnsupportedPlan
from fastav.layout import MEDIA, Layout, Modality
from fastav.method import Prompt
from fastav.plan import Plan

Pools = tuple[frozenset[Modality], ...]


class Counts(NamedTuple):
    """How many tokens of each row stay at a cut.

    limits: of each pool, then of tokens in none, which all stay, and of those that do not exist, which go.
    """

    pools: Pools
    limits: Int[Tensor, "batch kinds"]


def stage_prompt(layouts: Sequence[Layout], length: int, device: torch.device) -> Prompt:
    """Layouts as tensors of `length` columns, left-padded, and one more column of modality -1."""
    whole = np.zeros((6, len(layouts), length + 1), np.int64)
    whole[0] = -1
    seconds = np.full((len(layouts), length + 1), np.nan, np.float32)
    fields: tuple[Callable[[Layout], np.ndarray], ...] = (
        lambda layout: layout.modality,
        lambda layout: np.arange(len(layout)),
        lambda layout: layout.padding,
        lambda layout: layout.frame,
        _places,
        question,
    )
    for row, layout in enumerate(layouts):
        for plane, read in zip(whole, fields, strict=True):
            plane[row, length - len(layout) : length] = read(layout)
        seconds[row, length - len(layout) : length] = layout.second
    modality, position, padding, frame, place, asked = _upload(whole, device)
    return Prompt(
        modality=modality,
        position=position,
        padding=padding.bool(),
        frame=frame,
        place=place,
        second=_upload(seconds, device),
        question=asked.bool(),
    )


def question(layout: Layout) -> np.ndarray:
    """Whether each token is text behind the last audio or video token, or the prompt's last token."""
    media = np.isin(layout.modality, MEDIA)
    after = np.cumsum(media[::-1])[::-1] == 0
    after[-1:] = True
    return after


def _places(layout: Layout) -> np.ndarray:
    """Of each token, how many of its modality and frame stand before it."""
    order = np.lexsort((np.arange(len(layout)), layout.frame, layout.modality))
    modality, frame = layout.modality[order], layout.frame[order]
    new = np.ones(len(layout), bool)
    new[1:] = (np.diff(modality) != 0) | (np.diff(frame) != 0)
    starts = np.maximum.accumulate(np.where(new, np.arange(len(layout)), 0))
    places = np.empty(len(layout), np.int64)
    places[order] = np.arange(len(layout)) - starts
    return places


def stage_cuts(
    plan: Plan, layouts: Sequence[Layout], depth: int, device: torch.device
) -> tuple[list[Counts], list[tuple[int, bool]]]:
    """Counts of every cut, by pool and row, and the longest row it leaves and whether another row is shorter.

    Cuts of tokens come first, then those of caches alone.
    """
    caches = plan.cache_schedule if any(step.cache_only for step in plan.steps) else lambda *_: ()
    known = {id(layout): plan.schedule(layout, depth) + caches(layout, depth) for layout in layouts}
    cuts = list(zip(*(known[id(layout)] for layout in layouts), strict=True))
    pools = [tuple(rows[0].counts) for rows in cuts]
    limits = [
        [[*cut.counts.values(), len(layout), 0] for cut, layout in zip(rows, layouts, strict=True)] for rows in cuts
    ]
    sizes = [len(of) + 2 for of in pools]
    flat = np.concatenate([np.zeros((len(layouts), 0), np.int64), *limits], axis=1, dtype=np.int64)
    counts = [Counts(*one) for one in zip(pools, _upload(flat, device).split(sizes, dim=1), strict=True)]
    totals = [[cut.total for cut in rows] for rows in cuts]
    return counts, [(max(total), min(total) < max(total)) for total in totals]


def check_mask(mask: Tensor | None, layouts: Sequence[Layout], length: int, *, wait: bool) -> None:
    """Refuse a prompt whose real tokens are not the last ones of each row, as many as its layout has.

    wait: whether looking may wait for the device; otherwise a GPU looks for itself, and stops if they disagree.

    Raises: UnsupportedPlan.
    """
    lengths = [len(layout) for layout in layouts]
    if mask is None:
        if any(n != length for n in lengths):
            raise UnsupportedPlan(
                f"the prompts have {length} tokens, their layouts {lengths}, and there is no attention mask",
                "pass the attention mask, or one layout of full length per prompt",
            )
        return
    if mask.ndim != 2:
        return  # the caller's own rules of who sees whom; layouts were given with them
    expected = torch.arange(length)[None] >= length - torch.tensor(lengths)[:, None]
    if mask.is_cpu or wait:
        if mask.shape != expected.shape or not torch.equal(mask.bool().cpu(), expected):
            raise UnsupportedPlan(
                f"the attention mask shows {mask.bool().sum(1).tolist()} tokens, the layouts {lengths}, "
                "or the tokens shown are not the last ones of each row",
                "pad on the left, without holes",
            )
        return
    same = (mask.bool() == _upload(expected.numpy(), mask.device)).all()
    check: Any = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
    check(same, "the attention mask and the layouts given to fastav.prune disagree")


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
