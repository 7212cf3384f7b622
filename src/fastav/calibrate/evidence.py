"""Statistics of attention and rollout over many prompts, updated one prompt at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from fastav.layout import MEDIA, Layout, Modality
from fastav.trace import Trace

KINDS = ("attention", "rollout")
TOP = 0.1
"""Concentration is the share of the weight of audio and video that this share of their tokens, the heaviest, has."""


@dataclass(slots=True)
class Moments:
    """Mean and spread of arrays that are added one by one, each with its own set of bins.

    mean, squares: [..., bins], float64; squares are the sums of squared differences from the mean. count: for each bin,
    the number of arrays that have it.  Source: Welford's recurrence.
    """

    mean: np.ndarray
    squares: np.ndarray
    count: Int[np.ndarray, " bins"]

    @classmethod
    def empty(cls, *shape: int) -> "Moments":
        """Moments of no array, without any bin."""
        return cls(np.zeros((*shape, 0)), np.zeros((*shape, 0)), np.zeros(0, np.int64))

    def add(self, values: np.ndarray, bins: Int[np.ndarray, " here"]) -> None:
        """Add one array, [..., here], with the bin of each column; bins must be unique."""
        if (missing := int(bins.max(initial=-1)) + 1 - len(self.count)) > 0:
            wider = [(0, 0)] * (self.mean.ndim - 1) + [(0, missing)]
            self.mean, self.squares = np.pad(self.mean, wider), np.pad(self.squares, wider)
            self.count = np.pad(self.count, (0, missing))
        self.count[bins] += 1
        deviation = values - self.mean[..., bins]
        self.mean[..., bins] += deviation / self.count[bins]
        self.squares[..., bins] += deviation * (values - self.mean[..., bins])

    @property
    def spread(self) -> np.ndarray:
        """The standard deviation over arrays (n - 1); NaN for bins of only one array."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.count > 1, np.sqrt(self.squares / (self.count - 1)), np.nan)


@dataclass(slots=True)
class Evidence:
    """Statistics over the prompts added so far.

    profiles: the mean weight of a token, by position in the prompt, and for each modality by order (its k-th token),
    frame and second of the clip. modalities: the weight of each modality as a whole. concentration: of the weight of
    audio and video. All are [kinds, queries, layers, bins], with `KINDS` and `fastav.trace.QUERIES`. layouts: of the
    prompts, in order.
    """

    profiles: dict[tuple[str, Modality | None], Moments] = field(default_factory=dict)
    modalities: Moments = field(default_factory=lambda: Moments.empty(0, 0, 0))
    concentration: Moments = field(default_factory=lambda: Moments.empty(0, 0, 0))
    layouts: list[Layout] = field(default_factory=list)

    def add(self, trace: Trace) -> None:
        """Add one prompt."""
        weights = np.stack([trace.attention, trace.rollout]).astype(np.float64)
        if not self.layouts:
            self.modalities, self.concentration = Moments.empty(*weights.shape[:3]), Moments.empty(*weights.shape[:3])
        for axis, modality, tokens, bins in _bins(trace.layout):
            order = np.argsort(bins, kind="stable")
            occupied, first, sizes = np.unique(bins[order], return_index=True, return_counts=True)
            means = np.add.reduceat(weights[..., tokens[order]], first, axis=-1) / sizes
            self.profiles.setdefault((axis, modality), Moments.empty(*weights.shape[:3])).add(means, occupied)
        modality = trace.layout.modality
        present = np.unique(modality)
        self.modalities.add(np.stack([weights[..., modality == m].sum(-1) for m in present], -1), present.astype(int))
        if np.isin(modality, MEDIA).any():
            self.concentration.add(_concentration(weights[..., np.isin(modality, MEDIA)]), np.zeros(1, int))
        self.layouts.append(trace.layout)

    def present(self) -> tuple[Modality, ...]:
        """The modalities that any prompt has."""
        return tuple(m for m in Modality if len(self.modalities.count) > m and self.modalities.count[m])


def evidence_of(traces: Iterable[Trace]) -> Evidence:
    """Statistics of these traces; only one trace is in memory at a time."""
    evidence = Evidence()
    for trace in traces:
        evidence.add(trace)
    return evidence


def _bins(
    layout: Layout,
) -> Iterator[tuple[str, Modality | None, Int[np.ndarray, " here"], Int[np.ndarray, " here"]]]:
    """Axis, modality, token indices, and the bin of each token."""
    positions = np.arange(len(layout))
    yield "position", None, positions, positions
    for m in MEDIA:
        tokens = positions[layout.modality == m]
        if len(tokens):
            yield "order", m, tokens, np.arange(len(tokens))
        with_frame = tokens[layout.frame[tokens] >= 0]
        if len(with_frame):
            yield "frame", m, with_frame, layout.frame[with_frame].astype(int)
        with_second = tokens[np.isfinite(layout.second[tokens])]
        if len(with_second):
            yield "second", m, with_second, layout.second[with_second].astype(int)


def _concentration(weights: Float[np.ndarray, "kinds queries layers tokens"]) -> np.ndarray:
    """The share of the weight that the `TOP` heaviest tokens have, at least one token."""
    count = max(1, round(TOP * weights.shape[-1]))
    top = -np.partition(-weights, count - 1, axis=-1)[..., :count]
    return (top.sum(-1) / np.maximum(weights.sum(-1), 1e-30))[..., None]
