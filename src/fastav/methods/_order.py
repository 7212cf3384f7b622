"""Ranks within groups of tokens, and earlier tokens at the same place, without waiting for the device."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastav.layout import Modality
from fastav.method import View

ITEM_BITS = 16  # of the number of an item in a sort key
_BITS = 21  # of a position, place or frame in a sort key
_FLOAT32_BITS = 24  # of an integer that a float32 represents exactly


class Ranks(NamedTuple):
    """Ranks of tokens in their groups.

    rank: 0 for the highest score of a group; of equal scores the earlier token comes first. size: number of tokens in
    the group. order: indices sorted by group, then rank.
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
    sorted_group = group.gather(1, order)
    index = torch.arange(order.shape[1], device=order.device).expand_as(order)
    is_first = torch.ones_like(order, dtype=torch.bool)
    is_first[:, 1:] = sorted_group[:, 1:] != sorted_group[:, :-1]
    is_last = is_first.roll(-1, dims=1)
    start = torch.where(is_first, index, 0).cummax(1).values
    end = torch.where(is_last, index, order.shape[1]).flip(1).cummin(1).values.flip(1)
    empty = torch.empty_like(order)
    return Ranks(empty.scatter(1, order, index - start), empty.scatter(1, order, end - start + 1), order)


def temporal_ranks(view: View) -> Ranks:
    """Ranks by time, the earliest first, of the tokens that show the same place.

    Video tokens of a clip and of known frames form a group for each place of the picture; all audio tokens of a clip
    form one group, since they have no places, and so do video tokens of unknown frames. Each text token is a group of
    its own.
    """
    modality, position = view.modality, view.position
    has_frame = in_frames(view)
    no_place = torch.where(modality > Modality.TEXT, (1 << _BITS) - 1, position)  # larger than any place in a picture
    place = torch.where(has_frame, view.place, no_place)
    time = torch.where(has_frame, view.frame, position)
    return ranks(-time, (_in_item(view, modality + 1) << _BITS) | place)


def frame_groups(view: View) -> Int[Tensor, "batch tokens"]:
    """A number for each frame of each clip and modality; tokens without a frame share one by clip and modality."""
    return (_in_item(view, view.modality + 1) << _BITS) | (view.frame + 1)


def _in_item(view: View, number: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """A number that tells items apart, too."""
    return (number << ITEM_BITS) | (view.item + 1)


def in_frames(view: View) -> Bool[Tensor, "batch tokens"]:
    """Which tokens show part of a known frame."""
    return (view.modality > Modality.AUDIO) & (view.frame >= 0)


def radical_inverse(rank: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """The radical inverse of a rank, in [0, 1): ranks with the n lowest values are evenly spaced, for any n."""
    inverse = torch.zeros_like(rank)
    for bit in range(_FLOAT32_BITS):
        inverse |= (rank >> bit & 1) << (_FLOAT32_BITS - 1 - bit)
    return inverse.float() / 2**_FLOAT32_BITS


def earlier(
    order: Int[Tensor, "batch tokens"], n_ranks: Int[Tensor, "batch tokens"] | int
) -> Int[Tensor, "batch tokens"]:
    """Index of the token that is `n_ranks` ranks before each token; meaningless if its group begins after that."""
    return order.gather(1, (order.argsort(dim=1) - n_ranks).clamp(min=0))


def dense_ranks(
    value: Float[Tensor, "batch tokens"] | Int[Tensor, "batch tokens"],
    group: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
) -> Int[Tensor, "batch tokens"]:
    """The number of distinct values in each token's group that are below its own."""
    order = ranks(-value, group).order
    sorted_value, sorted_group = value.gather(1, order), group.gather(1, order)
    is_first = torch.ones_like(sorted_value, dtype=torch.bool)
    is_first[:, 1:] = sorted_group[:, 1:] != sorted_group[:, :-1]
    is_new = is_first.clone()
    is_new[:, 1:] |= sorted_value[:, 1:] != sorted_value[:, :-1]
    count = is_new.cumsum(1)
    start = torch.where(is_first, count, 0).cummax(1).values
    return torch.empty_like(count).scatter(1, order, count - start)


def rows_at(
    values: Float[Tensor, "batch tokens features"], index: Int[Tensor, "batch selected"]
) -> Float[Tensor, "batch selected features"]:
    """The features of the tokens `index`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
