"""What a plan leaves of a prompt: mean retention, and clips whose end is dropped."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from fastav.layout import MEDIA, Layout, Modality

_LABELS = frozenset(m.label for m in MEDIA)
_LEAST = 6  # tokens of a track, below which thirds mean nothing


def mean_retention(layers: Sequence[Mapping[str, int]], prompt: Mapping[str, int]) -> float | None:
    """The share of a prompt's audio, video and images that decoder layers run on, mean over layers.

    None without media, or where a pool with text hides how many media remain.
    layers: numbers of tokens that each layer runs on, by modality or pool. prompt: by modality, before pruning.
    """
    total = sum(n for label, n in prompt.items() if label in _LABELS)
    if not total or any("all" in layer for layer in layers):
        return None
    return sum(n for layer in layers for label, n in layer.items() if label != "text") / (total * len(layers))


def dropped_ends(layout: Layout, cuts: Iterable[tuple[int, Int[np.ndarray, " _"]]]) -> dict[str, int]:
    """The first layer that runs on part of a clip's sound (or video) but on nothing of its last third, by modality.

    cuts: layers, and the positions of the tokens that remain from there on. Where all of a track is dropped, no
    beginning is preferred, and nothing is reported. Of several clips, the first such layer counts.
    """
    found: dict[str, int] = {}
    for layer, kept in cuts:
        for modality in (Modality.AUDIO, Modality.VIDEO):
            for item in range(layout.items):
                track = np.flatnonzero((layout.item == item) & (layout.modality == modality))
                remains = np.isin(track, kept)
                if len(track) >= _LEAST and remains.any() and not remains[-(len(track) // 3) :].any():
                    found.setdefault(modality.label, layer)
    return found
