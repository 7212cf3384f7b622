"""Windows of time, planned on the host so that their number and sizes need no wait for the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastav.layout import MEDIA, Layout, Modality
from fastav.method import View
from fastav.transfer import upload

_UNTIMED = 50  # audio tokens per window where their seconds are unknown, as in 2 s of Qwen2.5-Omni


@dataclass(frozen=True, slots=True)
class Windows:
    """Groups of remaining tokens, padded to one size.

    tokens: index of each token among the remaining ones; their number where a place is empty. order: index of each
    window among those of sound, or of pictures, in time. sizes: by row, the modality of each window and its number of
    tokens in the unpruned prompt.
    """

    tokens: Int[Tensor, "batch windows size"]
    order: Int[Tensor, "batch windows"]
    sizes: Sequence[Sequence[tuple[Modality, int]]]

    def per_token(self, values: Float[Tensor, "batch windows size"], n: int) -> Float[Tensor, "batch tokens"]:
        """Values of tokens in windows, by token; 0 for tokens in none.  n: number of remaining tokens."""
        flat = values.new_zeros(values.shape[0], n + 1)
        return flat.scatter(1, self.tokens.flatten(1), values.flatten(1))[:, :n]

    def gather(self, values: Float[Tensor, "batch tokens *features"]) -> Float[Tensor, "batch windows size *features"]:
        """Values of tokens, by window; 0 for empty places."""
        padded = torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)
        index = self.tokens.flatten(1).view(len(values), -1, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        return padded.gather(1, index).view(*self.tokens.shape, *values.shape[2:])


def windows_of(view: View, split: Callable[[Layout], Sequence[np.ndarray]]) -> Windows:
    """The windows of a batch.  split: the positions of the tokens of each window of a prompt, one modality each."""
    layouts, length = view.layouts, view.columns
    groups = [split(layout) for layout in layouts]
    n = max([1, *map(len, groups)])
    size = max([1, *(len(group) for row in groups for group in row)])
    planes = np.full((2, len(layouts), n, size), length, np.int64)
    sizes: list[list[tuple[Modality, int]]] = []
    for row, (layout, found) in enumerate(zip(layouts, groups, strict=True)):
        sizes.append([(Modality(layout.modality[group[0]]), len(group)) for group in found])
        seen = {True: 0, False: 0}
        for window, (group, (modality, count)) in enumerate(zip(found, sizes[-1], strict=True)):
            planes[0, row, window, :count] = length - len(layout) + group
            is_sound = modality == Modality.AUDIO
            planes[1, row, window] = seen[is_sound]
            seen[is_sound] += 1
    columns, order = upload(planes, view.slots.device)
    kept = view.slots.shape[1]
    index = torch.full((len(layouts), length + 1), kept, device=columns.device)
    index.scatter_(1, view.slots, torch.arange(kept, device=columns.device).expand_as(view.slots))
    index[:, length] = kept  # where rows with fewer tokens point
    tokens = index.gather(1, columns.flatten(1)).view_as(columns)
    return Windows(tokens, order[:, :, 0], sizes)


def by_time(layout: Layout, frames: int, seconds: float | int) -> list[np.ndarray]:
    """The positions of the tokens of each window of every clip, sound and image, in time.

    frames: sampled frames (of models that join two into one grid: grids) in a window of video. seconds: of a window of
    sound. Video whose frames are unknown is one window.
    """
    windows: list[np.ndarray] = []
    for item in range(layout.items):
        for modality in MEDIA:
            tokens = np.flatnonzero((layout.item == item) & (layout.modality == modality))
            if not len(tokens):
                continue
            if modality == Modality.AUDIO:
                second = layout.second[tokens]
                untimed = np.arange(len(tokens)) // _UNTIMED
                number = untimed if np.isnan(second).any() else np.floor(second / seconds + 1e-6).astype(np.int64)
            else:
                _, grid = np.unique(layout.frame[tokens], return_inverse=True)
                number = grid // frames
            order = np.argsort(number, kind="stable")
            starts = np.flatnonzero(np.diff(number[order])) + 1
            windows += np.split(tokens[order], starts)
    return windows


def runs(layout: Layout) -> list[np.ndarray]:
    """The positions of each run of media of one modality and item, with only text or other runs in between."""
    media = np.flatnonzero(np.isin(layout.modality, MEDIA))
    if not len(media):
        return []
    keys = np.stack([layout.modality[media], layout.item[media]])
    starts = np.flatnonzero(np.any(np.diff(keys, axis=1) != 0, axis=0)) + 1
    return np.split(media, starts)
