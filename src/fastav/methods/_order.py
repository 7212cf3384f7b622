"""Ranks within groups of tokens, and what shows the same part at an earlier time, without waiting for the device."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastav.layout import Modality
from fastav.method import View

_BITS = 21  # of a position, place or frame in a sorting key
_EXACT = 24  # bits of a whole number that a float32 holds


class Ranks(NamedTuple):
    """rank: of a token in its group, 0 being the highest score, ties going to the earlier token. size: of its group.

    order: indices sorted by group, then rank.
    """

    rank: Int[Tensor, "batch tokens"]
    size: Int[Tensor, "batch tokens"]
    order: Int[Tensor, "batch tokens"]


def ranks(
    scores: Float[Tensor, "batch tokens"] | Int[Tensor, "batch tokens"],
    group: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
) -> Ranks:
    """Ranks of tokens among those of the same group."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    found = group.gather(1, order)
    here = torch.arange(order.shape[1], device=order.device).expand_as(order)
    first = torch.ones_like(order, dtype=torch.bool)
    first[:, 1:] = found[:, 1:] != found[:, :-1]
    last = first.roll(-1, dims=1)
    start = torch.where(first, here, 0).cummax(1).values
    end = torch.where(last, here, order.shape[1]).flip(1).cummin(1).values.flip(1)
    back = torch.empty_like(order)
    return Ranks(back.scatter(1, order, here - start), back.scatter(1, order, end - start + 1), order)


def courses(view: View) -> Ranks:
    """Tokens that show the same part at successive times, as groups ranked by time, the earliest first.

    A course of video is one place of the picture, through the frames still there; of audio the whole sound, token by
    token, since its tokens have no parts; so is video of unknown frames. Text has no course: each token is alone.
    """
    modality, position = view.modality, view.position
    shown = framed(view)
    alone = torch.where(modality > Modality.TEXT, (1 << _BITS) - 1, position)  # no picture has so many parts
    place = torch.where(shown, view.place, alone)
    time = torch.where(shown, view.frame, position)
    return ranks(-time, ((modality + 1) << _BITS) | place)


def framed(view: View) -> Bool[Tensor, "batch tokens"]:
    """Which tokens show part of a frame that is known."""
    return (view.modality > Modality.AUDIO) & (view.frame >= 0)


def spread(rank: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """The radical inverse of a rank, in [0, 1): however many ranks have the lowest ones, they are spread evenly."""
    inverse = torch.zeros_like(rank)
    for bit in range(_EXACT):
        inverse |= (rank >> bit & 1) << (_EXACT - 1 - bit)
    return inverse.float() / 2**_EXACT


def earlier(order: Int[Tensor, "batch tokens"], back: Int[Tensor, "batch tokens"] | int) -> Int[Tensor, "batch tokens"]:
    """Index of the token so many ranks before each token; means nothing where its group begins after that."""
    return order.gather(1, (order.argsort(dim=1) - back).clamp(min=0))


def turns(
    value: Float[Tensor, "batch tokens"] | Int[Tensor, "batch tokens"],
    group: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
) -> Int[Tensor, "batch tokens"]:
    """How many different values below its own each token's group has."""
    place = ranks(-value, group)
    found, of = value.gather(1, place.order), group.gather(1, place.order)
    first, new = torch.ones_like(found, dtype=torch.bool), torch.ones_like(found, dtype=torch.bool)
    first[:, 1:] = of[:, 1:] != of[:, :-1]
    new[:, 1:] = first[:, 1:] | (found[:, 1:] != found[:, :-1])
    count = new.cumsum(1)
    start = torch.where(first, count, 0).cummax(1).values
    return torch.empty_like(count).scatter(1, place.order, count - start)


def rows_at(
    values: Float[Tensor, "batch tokens features"], index: Int[Tensor, "batch picked"]
) -> Float[Tensor, "batch picked features"]:
    """The rows of these tokens."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
