"""Mean retention: the share of audio, video and images that decoder layers run on, mean over layers."""

from collections.abc import Mapping, Sequence

from fastav.layout import MEDIA

_LABELS = frozenset(m.label for m in MEDIA)


def mean_retention(layers: Sequence[Mapping[str, int]], prompt: Mapping[str, int]) -> float | None:
    """The mean retention of one prompt; None without media, or where a pool with text hides how many media remain.

    layers: numbers of tokens that each layer runs on, by modality or pool. prompt: by modality, before pruning.
    """
    total = sum(n for label, n in prompt.items() if label in _LABELS)
    if not total or any("all" in layer for layer in layers):
        return None
    return sum(n for layer in layers for label, n in layer.items() if label != "text") / (total * len(layers))
