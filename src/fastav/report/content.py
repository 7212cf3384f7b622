"""The content of a report: a calibration's folder, read, checked and prepared for drawing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from fastav.calibrate import KINDS, Comparison, Evidence, Moments, Record, Store, evidence_of
from fastav.errors import CalibrationError, reason_of
from fastav.layout import MEDIA, Layout, Modality
from fastav.plan import Plan
from fastav.trace import QUERIES

COLUMNS = 600  # columns at most in a picture of a long prompt
LAST = QUERIES.index("last")


@dataclass(frozen=True, slots=True)
class AnswerSummary:
    """An answer: its text, the tokens of each layer by modality, and its costs as shares of the unpruned model's."""

    text: str
    layers: tuple[Mapping[str, int], ...]
    flops: float
    kv: float

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "AnswerSummary":
        """From the result of `fastav.Answer.to_dict`."""
        return cls(
            str(answer["text"]),
            tuple(
                {Modality[m.upper()].label: int(n) for m, n in layer.items()} for layer in answer["tokens_per_layer"]
            ),
            float(answer["flops"]["ratio"]),
            float(answer["kv_bytes"]["ratio"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A finished calibration.

    head: the settings of the calibration. origin: the origin of its plan. start, held, flops, tokens: as in
    `fastav.calibrate.Choice`. example: the prompt that the report shows, traced with the plan. unpruned, pruned: the
    answers to it.
    """

    head: Mapping[str, Any]
    origin: Mapping[str, Any]
    plan: Plan
    start: int
    held: float | None
    flops: float
    kv: float
    tokens: float
    failures: tuple[tuple[str, str], ...]
    unpruned: AnswerSummary
    pruned: AnswerSummary
    evidence: Evidence
    example: Record
    comparison: Comparison | None = None

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return self.head["layers"]

    @property
    def before(self) -> int:
        """The last layer before the global cut; the rule uses its weights."""
        return self.start - 1


def read(folder: Path) -> Content:
    """The content of a folder.  Raises: CalibrationError, PlanError."""
    store = Store(folder)
    head, result = store.head(), store.result()
    try:
        plan = Plan.from_json(result["plan"])
        evidence = evidence_of(store.load(key).trace for key in result["prompts"])
        unpruned, pruned = map(AnswerSummary.of, result["answers"])
        return Content(
            head=head,
            origin=dict(plan.origin or {}),
            plan=plan,
            start=int(result["start"]),
            held=None if result["held"] is None else float(result["held"]),
            flops=float(result["flops"]),
            kv=float(result["kv"]),
            tokens=float(result["tokens"]),
            failures=tuple((Path(one["clip"]).name, str(one["reason"])) for one in result["failures"]),
            unpruned=unpruned,
            pruned=pruned,
            evidence=evidence,
            example=store.load(result["shown"]),
            comparison=store.comparison(),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CalibrationError(
            f"{folder / 'result.json'} is not what a calibration writes: {reason_of(error, with_type=True)}",
            "calibrate again",
        ) from None


def binned(values: Float[np.ndarray, "... tokens"], most: int = COLUMNS) -> Float[np.ndarray, "... columns"]:
    """Means of neighbouring values, if there are more than `most`."""
    edges = np.linspace(0, values.shape[-1], min(values.shape[-1], most) + 1).round().astype(int)
    return np.add.reduceat(values, edges[:-1], axis=-1) / np.diff(edges)


def maps(evidence: Evidence) -> dict[str, Float[np.ndarray, "layers columns"]]:
    """For each kind, the weight of a token by layer and position; a mean over the prompts that reach the position."""
    mean = evidence.profiles["position", None].mean
    return {kind: binned(mean[index, LAST]) for index, kind in enumerate(KINDS)}


def tracks(evidence: Evidence) -> dict[Modality, Float[np.ndarray, " columns"]]:
    """For each modality, its share of the tokens at every position, over the prompts that reach the position."""
    counts = np.zeros((len(Modality), max(map(len, evidence.layouts))))
    for layout in evidence.layouts:
        counts[layout.modality.astype(int), np.arange(len(layout))] += 1
    shares = binned(counts / counts.sum(0))
    return {m: shares[m] for m in Modality if shares[m].any()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Weights of the tokens of a modality: mean and spread over prompts (NaN for a single prompt), between edges."""

    edges: Float[np.ndarray, " edges"]
    mean: Float[np.ndarray, " bins"]
    spread: Float[np.ndarray, " bins"]


def curves(content: Content, axis: str) -> dict[tuple[str, Modality], Curve]:
    """The curves of each kind and modality along this axis, at the last layer before the cut."""
    profiles = content.evidence.profiles
    return {
        (kind, m): _curve(profiles[axis, m], index, content.before)
        for index, kind in enumerate(KINDS)
        for m in MEDIA
        if (axis, m) in profiles
    }


def _curve(moments: Moments, kind: int, layer: int) -> Curve:
    occupied = np.flatnonzero(moments.count)  # skips seconds in which no token starts
    mean, spread = (values[kind, LAST, layer, occupied] for values in (moments.mean, moments.spread))
    edges = np.linspace(0, len(occupied), min(len(occupied), COLUMNS) + 1).round().astype(int)
    return Curve(
        edges=np.append(occupied, len(moments.count))[edges].astype(float), mean=binned(mean), spread=binned(spread)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityCut:
    """The effect of the global cut on a modality, over prompts.

    remaining, total: tokens of each prompt after and before the cut. remaining is empty if scores decide, not the plan
    alone. seconds: the start of the first dropped token in the clip, of the prompts where it is known. is_prefix:
    whether the first tokens are those that stay.
    """

    remaining: Int[np.ndarray, " prompts"]
    total: Int[np.ndarray, " prompts"]
    seconds: Float[np.ndarray, " cut"]
    is_prefix: bool


def modality_cuts(content: Content) -> dict[Modality, ModalityCut]:
    """The effect of the cut on audio, video and images, as far as they are present."""
    plan, layouts = content.plan, content.evidence.layouts
    methods = {step.method for layer, step in plan.cuts(content.depth) if layer <= content.start}
    is_prefix = methods <= {"position"}
    cuts = {}
    for m in MEDIA:
        with_modality = [layout for layout in layouts if layout.count(m)]
        if not with_modality:
            continue
        remaining_counts, seconds = [], []
        for layout in with_modality:
            budgets = plan.layers(layout, content.depth)[content.start]
            if is_prefix:
                modality_tokens = np.flatnonzero(layout.modality == m)
                dropped = modality_tokens[~np.isin(modality_tokens, _first_tokens(layout, budgets))]
                remaining_counts.append(len(modality_tokens) - len(dropped))
                seconds += [s for s in [np.min(layout.second[dropped], initial=np.inf)] if np.isfinite(s)]
            elif frozenset({m}) in budgets:
                remaining_counts.append(budgets[frozenset({m})])
        cuts[m] = ModalityCut(
            remaining=np.array(remaining_counts, int),
            total=np.array([layout.count(m) for layout in with_modality]),
            seconds=np.array(seconds, float),
            is_prefix=is_prefix,
        )
    return cuts


def dropped_attention(content: Content) -> dict[Modality, float]:
    """Of each modality that a cut by position drops some of: the share of its attention that is on dropped tokens.

    It is that of the prompt's last token at the last layer before the cut, as a mean over prompts.
    """
    shares = {}
    for m, cut in modality_cuts(content).items():
        if not (cut.is_prefix and len(cut.remaining) and cut.remaining.sum() < cut.total.sum()):
            continue
        moments = content.evidence.profiles["order", m]
        weight = moments.mean[KINDS.index("attention"), LAST, content.before] * moments.count
        kept = round(float(cut.remaining.mean()))
        if (whole := float(np.nansum(weight))) > 0:
            shares[m] = float(np.nansum(weight[kept:])) / whole
    return shares


def _first_tokens(layout: Layout, budgets: Mapping[frozenset[Modality], int]) -> Int[np.ndarray, " kept"]:
    """The tokens that stay if the earliest of each pool do."""
    pools = (np.flatnonzero(np.isin(layout.modality, list(pool)))[:count] for pool, count in budgets.items())
    return np.concatenate([*pools, np.zeros(0, np.int64)])


def weight_shares(content: Content, kind: str) -> dict[Modality, float]:
    """For each modality, the share of the weight that its tokens have together at the last layer before the cut.

    Means over the prompts with this modality.
    """
    moments = content.evidence.modalities
    return {m: float(moments.mean[KINDS.index(kind), LAST, content.before, m]) for m in content.evidence.present()}


@dataclass(frozen=True, slots=True)
class FrameTokens:
    """A frame, its second in the clip, and how many of its tokens remain."""

    index: int
    second: float
    remaining: int
    total: int


def remaining_tokens(record: Record, start: int) -> Bool[np.ndarray, " tokens"]:
    """A mask of the prompt's tokens that remain after the global cut."""
    mask = np.ones(len(record.trace.layout), bool)
    for layer, selected in record.trace.selections:
        if layer <= start:
            mask &= np.isin(np.arange(len(mask)), selected)
    return mask


def frame_tokens(record: Record, start: int) -> list[FrameTokens]:
    """The frames of the preview that the model used, each with the tokens that start nearest to it."""
    layout, moments = record.trace.layout, record.preview.moments
    is_visual = np.isin(layout.modality, (Modality.VIDEO, Modality.IMAGE)) & np.isfinite(layout.second)
    if not (is_visual.any() and len(moments)):
        return []
    starts = np.unique(layout.second[is_visual])
    mask = remaining_tokens(record, start)
    nearest_frame: dict[int, int] = {}  # from the start of a frame's tokens to the nearest picture
    for index, moment in enumerate(moments):
        nearest = int(np.abs(starts - moment).argmin())
        current = nearest_frame.get(nearest)
        if current is None or abs(moment - starts[nearest]) < abs(moments[current] - starts[nearest]):
            nearest_frame[nearest] = index
    frames = []
    for nearest, index in sorted(nearest_frame.items()):
        in_frame = is_visual & (layout.second == starts[nearest])
        frames.append(FrameTokens(index, float(starts[nearest]), int(mask[in_frame].sum()), int(in_frame.sum())))
    return frames


def audio_segments(record: Record, start: int) -> Iterator[tuple[float, float, float]]:
    """Segments of the sound as start and end in seconds, with the share of their tokens that remains; equal ones are
    joined.
    """
    layout, end = record.trace.layout, record.preview.duration
    is_audio = (layout.modality == Modality.AUDIO) & np.isfinite(layout.second)
    starts, inverse, counts = np.unique(layout.second[is_audio], return_inverse=True, return_counts=True)
    shares = np.bincount(inverse, remaining_tokens(record, start)[is_audio], minlength=len(starts)) / np.maximum(
        counts, 1
    )
    in_clip = starts < end
    starts, shares = starts[in_clip].astype(float), shares[in_clip]
    first = np.flatnonzero(np.diff(shares, prepend=-1.0))
    yield from zip(starts[first], [*starts[first][1:], end], shares[first], strict=False)


def token_counts(layout: Layout, modalities: Sequence[Modality], mask: Bool[np.ndarray, " tokens"]) -> tuple[int, int]:
    """The number of tokens of these modalities that remain, and their total."""
    is_counted = np.isin(layout.modality, modalities)
    return int(mask[is_counted].sum()), int(is_counted.sum())
