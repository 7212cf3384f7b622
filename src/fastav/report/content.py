"""What a calibration's folder holds, read, checked, and made ready to be drawn."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from fastav.calibrate import KINDS, Evidence, Moments, Record, Store, evidence_of
from fastav.errors import CalibrationError, reason_of
from fastav.layout import MEDIA, Layout, Modality
from fastav.plan import Plan
from fastav.trace import QUERIES

COLUMNS = 600  # that a picture of a long prompt has
LAST = QUERIES.index("last")


@dataclass(frozen=True, slots=True)
class Told:
    """An answer: its text, tokens by modality that each layer ran on, and costs as shares of the unpruned model's."""

    text: str
    layers: tuple[Mapping[str, int], ...]
    flops: float
    kv: float

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "Told":
        """From what `fastav.Answer.to_dict` gave."""
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

    head, origin: what it was begun with, and what its plan was made from. start, held, flops, tokens: as
    `fastav.calibrate.Choice`. unpruned, pruned: the answers to the prompt that is shown, and shown what the plan left
    of it.
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
    unpruned: Told
    pruned: Told
    evidence: Evidence
    shown: Record

    @property
    def depth(self) -> int:
        """Layers of the decoder."""
        return self.head["layers"]

    @property
    def before(self) -> int:
        """The last layer that runs before the global cut, whose weights the rule reads."""
        return self.start - 1


def read(folder: Path) -> Content:
    """What is in a folder.  Raises: CalibrationError, PlanError."""
    store = Store(folder)
    head, result = store.head(), store.result()
    try:
        plan = Plan.from_json(result["plan"])
        evidence = evidence_of(store.load(key).trace for key in result["prompts"])
        unpruned, pruned = map(Told.of, result["answers"])
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
            shown=store.load(result["shown"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CalibrationError(
            f"{folder / 'result.json'} is not what a calibration writes: {reason_of(error, with_type=True)}",
            "calibrate again",
        ) from None


def binned(values: Float[np.ndarray, "... tokens"], most: int = COLUMNS) -> Float[np.ndarray, "... columns"]:
    """Means of neighbours, where there are more than `most`."""
    edges = np.linspace(0, values.shape[-1], min(values.shape[-1], most) + 1).round().astype(int)
    return np.add.reduceat(values, edges[:-1], axis=-1) / np.diff(edges)


def maps(evidence: Evidence) -> dict[str, Float[np.ndarray, "layers columns"]]:
    """Of each kind the weight of a token by layer and position, mean over the prompts that are so long."""
    mean = evidence.profiles["position", None].mean
    return {kind: binned(mean[index, LAST]) for index, kind in enumerate(KINDS)}


def tracks(evidence: Evidence) -> dict[Modality, Float[np.ndarray, " columns"]]:
    """Of each modality the share that it has at every position, over the prompts that are so long."""
    counts = np.zeros((len(Modality), max(map(len, evidence.layouts))))
    for layout in evidence.layouts:
        counts[layout.modality.astype(int), np.arange(len(layout))] += 1
    shares = binned(counts / counts.sum(0))
    return {m: shares[m] for m in Modality if shares[m].any()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Weights of the tokens of a modality: mean and spread over prompts (NaN where there is one), from edge to edge."""

    edges: Float[np.ndarray, " edges"]
    mean: Float[np.ndarray, " bins"]
    spread: Float[np.ndarray, " bins"]


def curves(content: Content, axis: str) -> dict[tuple[str, Modality], Curve]:
    """Of each kind and modality that has this axis, at the last layer before the cut."""
    profiles = content.evidence.profiles
    return {
        (kind, m): _curve(profiles[axis, m], index, content.before)
        for index, kind in enumerate(KINDS)
        for m in MEDIA
        if (axis, m) in profiles
    }


def _curve(moments: Moments, kind: int, layer: int) -> Curve:
    known = np.flatnonzero(moments.count)  # no token may start in a second
    mean, spread = (values[kind, LAST, layer, known] for values in (moments.mean, moments.spread))
    edges = np.linspace(0, len(known), min(len(known), COLUMNS) + 1).round().astype(int)
    return Curve(
        edges=np.append(known, len(moments.count))[edges].astype(float), mean=binned(mean), spread=binned(spread)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What the global cut leaves of a modality, over prompts.

    kept, there: tokens, of each prompt. seconds: of the clip, where the first token that goes starts, of the prompts
    where one goes and that is known. ordered: whether it is the first tokens that stay. kept is empty if the plan does
    not tell (the scores do).
    """

    kept: Int[np.ndarray, " prompts"]
    there: Int[np.ndarray, " prompts"]
    seconds: Float[np.ndarray, " cut"]
    ordered: bool


def cuts(content: Content) -> dict[Modality, Cut]:
    """Of each modality of audio, video and images that is present."""
    plan, layouts = content.plan, content.evidence.layouts
    methods = {step.method for layer, step in plan.cuts(content.depth) if layer <= content.start}
    ordered = methods <= {"position"}
    cuts = {}
    for m in MEDIA:
        some = [layout for layout in layouts if layout.count(m)]
        if not some:
            continue
        kept, seconds = [], []
        for layout in some:
            there = plan.layers(layout, content.depth)[content.start]
            if ordered:
                tokens = np.flatnonzero(layout.modality == m)
                gone = tokens[~np.isin(tokens, _earliest(layout, there))]
                kept.append(len(tokens) - len(gone))
                seconds += [s for s in [np.min(layout.second[gone], initial=np.inf)] if np.isfinite(s)]
            elif frozenset({m}) in there:
                kept.append(there[frozenset({m})])
        cuts[m] = Cut(
            kept=np.array(kept, int),
            there=np.array([layout.count(m) for layout in some]),
            seconds=np.array(seconds, float),
            ordered=ordered,
        )
    return cuts


def _earliest(layout: Layout, there: Mapping[frozenset[Modality], int]) -> Int[np.ndarray, " kept"]:
    """The tokens that stay where of each pool the earliest do."""
    pools = (np.flatnonzero(np.isin(layout.modality, list(pool)))[:count] for pool, count in there.items())
    return np.concatenate([*pools, np.zeros(0, np.int64)])


def holders(content: Content, kind: str) -> dict[Modality, float]:
    """Of each modality the share of the weight that its tokens hold together at the last layer before the cut.

    Means over the prompts that have it.
    """
    moments = content.evidence.modalities
    return {m: float(moments.mean[KINDS.index(kind), LAST, content.before, m]) for m in content.evidence.present()}


@dataclass(frozen=True, slots=True)
class Picture:
    """A frame, its place in the clip, and how many of its tokens stay."""

    index: int
    second: float
    stay: int
    there: int


def survivors(shown: Record, start: int) -> Bool[np.ndarray, " tokens"]:
    """The tokens of the prompt that are there from the global cut on."""
    stay = np.ones(len(shown.trace.layout), bool)
    for layer, kept in shown.trace.kept:
        if layer <= start:
            stay &= np.isin(np.arange(len(stay)), kept)
    return stay


def pictures(shown: Record, start: int) -> list[Picture]:
    """The frames that were kept as pictures and that the model saw, each with the tokens that start nearest to it."""
    layout, moments = shown.trace.layout, shown.look.moments
    seen = np.isin(layout.modality, (Modality.VIDEO, Modality.IMAGE)) & np.isfinite(layout.second)
    if not (seen.any() and len(moments)):
        return []
    starts = np.unique(layout.second[seen])
    stay = survivors(shown, start)
    found: dict[int, int] = {}  # the start of a frame's tokens, and the picture nearest to it
    for index, moment in enumerate(moments):
        nearest = int(np.abs(starts - moment).argmin())
        best = found.get(nearest)
        if best is None or abs(moment - starts[nearest]) < abs(moments[best] - starts[nearest]):
            found[nearest] = index
    drawn = []
    for nearest, index in sorted(found.items()):
        tokens = seen & (layout.second == starts[nearest])
        drawn.append(Picture(index, float(starts[nearest]), int(stay[tokens].sum()), int(tokens.sum())))
    return drawn


def stretches(shown: Record, start: int) -> Iterator[tuple[float, float, float]]:
    """Stretches of the sound, from second to second, and the share of their tokens that stays; like ones joined."""
    layout, end = shown.trace.layout, shown.look.duration
    heard = (layout.modality == Modality.AUDIO) & np.isfinite(layout.second)
    starts, inverse, counts = np.unique(layout.second[heard], return_inverse=True, return_counts=True)
    shares = np.bincount(inverse, survivors(shown, start)[heard], minlength=len(starts)) / np.maximum(counts, 1)
    within = starts < end
    starts, shares = starts[within].astype(float), shares[within]
    first = np.flatnonzero(np.diff(shares, prepend=-1.0))
    yield from zip(starts[first], [*starts[first][1:], end], shares[first], strict=False)


def tokens(layout: Layout, modalities: Sequence[Modality], stay: Bool[np.ndarray, " tokens"]) -> tuple[int, int]:
    """How many of these stay, and how many there are."""
    here = np.isin(layout.modality, modalities)
    return int(stay[here].sum()), int(here.sum())
