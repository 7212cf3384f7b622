"""From evidence to a plan: where to cut, which tokens stay, how many.

Source: arXiv:2601.13143, section 3: attention concentrates from the middle layers on, rollout shows on which tokens,
and a fixed rule is read off it. How the paper reads it is not stated; the criteria here are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from fastav.calibrate.evidence import KINDS, Evidence
from fastav.errors import CalibrationError
from fastav.flops import DecoderShape, prefill_flops
from fastav.layout import MEDIA, Layout, Modality
from fastav.plan import Before, Budget, Frames, Keep, Plan, Share, Step, Tokens
from fastav.presets import fastav
from fastav.trace import QUERIES

Rule = Literal["auto", "even", "first", "frames", "before", "rollout"]
Start = Literal["middle", "concentration"] | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """How a plan is read off evidence.

    budget: FLOPs of the prefill to reach, as a share of the unpruned model's. tokens: instead of `budget`, how many
    tokens of audio and video are to stay at the global cut, as a mean over prompts.
    start: the layer of the global cut. `concentration`: the first layer after which the attention of the last query is
    never less than half-way from its least to its greatest concentration (`fastav.calibrate.evidence.TOP`).
    rule: `even`: of each modality the first tokens that hold the same share of its rollout. `first`: of each modality
    the first tokens, split so that they hold the most rollout together. `frames`: what belongs to the first frames.
    `before`: what stands before a position. `auto`: that of the last three whose tokens hold the most; of these a
    modality that has little may go whole. `rollout`: no fixed rule; of each modality the same share, by the rollout of
    the prompt at hand.
    drop: share of what is left that goes entering every later layer, by the last query.

    Raises: CalibrationError for a share outside of (0, 1), both budgets or neither.
    """

    budget: float | None = 0.56
    tokens: int | None = None
    start: Start = "middle"
    rule: Rule = "even"
    drop: float | int = 0.2

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.tokens is None):
            raise CalibrationError("give either a budget of FLOPs or a number of tokens")
        if self.budget is not None and not 0 < self.budget < 1:
            raise CalibrationError(f"a budget must be in (0, 1), got {self.budget:g}", "0.56 is 56 % of the FLOPs")
        if self.tokens is not None and self.tokens < 1:
            raise CalibrationError(f"the number of tokens must be at least 1, got {self.tokens}")
        if not 0 <= self.drop < 1:
            raise CalibrationError(f"drop must be in [0, 1), got {self.drop:g}", "0.2 drops 20 %")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A plan and what speaks for it.

    held: of the rollout that audio and video have where the global cut is made, the share on tokens that stay (means
    over prompts; of the rule `rollout`, what the heaviest tokens of each prompt hold is not known from means: None).
    flops: of the prefill, a share of the unpruned model's. tokens: of audio and video that stay at the global cut. Both
    are means over prompts.
    """

    plan: Plan
    rule: str
    start: int
    held: float | None
    flops: float
    tokens: float


def choose(evidence: Evidence, shape: DecoderShape, criterion: Criterion) -> Choice:
    """The plan that a criterion reads off evidence.

    Raises: CalibrationError if the budget cannot be reached, the layer does not exist, or the prompts have no audio or
    video.
    """
    if not any(layout.count(*MEDIA) for layout in evidence.layouts):
        raise CalibrationError("none of the prompts has audio or video", "give clips")
    start = start_layer(evidence, shape.layers, criterion.start)
    rules = ("first", "frames", "before") if criterion.rule == "auto" else (criterion.rule,)
    choices = [found for rule in rules if (found := _fitted(evidence, shape, criterion, rule, start)) is not None]
    if not choices:
        raise CalibrationError(*_unreachable(evidence, shape, criterion, rules, start))
    return max(choices, key=lambda choice: round(choice.held or 0.0, 9))  # of equals the first


def start_layer(evidence: Evidence, depth: int, start: Start) -> int:
    """The layer of the global cut.  Raises: CalibrationError."""
    if start == "middle":
        return depth // 2
    if isinstance(start, int):
        if not 0 < start < depth:
            raise CalibrationError(f"the start must be a layer from 1 to {depth - 1}, got {start}")
        return start
    concentration = evidence.concentration.mean[KINDS.index("attention"), QUERIES.index("last"), :, 0]
    high = concentration >= (concentration.min() + concentration.max()) / 2
    after = int(np.flatnonzero(~high).max(initial=-1)) + 1  # the first layer from which on it is always high
    return min(max(after + 1, 1), depth - 1)


Kept = Callable[[int], tuple[Keep, float | None]]  # a setting: what it keeps, and the rollout that holds


def _fitted(evidence: Evidence, shape: DecoderShape, criterion: Criterion, rule: str, start: int) -> Choice | None:
    """The most that a rule can keep within the budget; None if even the least is too much."""
    settings, kept = _rules(evidence, rule, start)
    plan = _planned(criterion, rule, start)
    low, high = 0, settings - 1
    if settings == 0 or not _within(evidence, shape, criterion, plan(kept(low)[0]), start):
        return None
    while low < high:  # what is kept grows with the setting
        middle = (low + high + 1) // 2
        if _within(evidence, shape, criterion, plan(kept(middle)[0]), start):
            low = middle
        else:
            high = middle - 1
    keep, held = kept(low)
    flops, tokens = costs(evidence.layouts, shape, plan(keep), start)
    return Choice(plan=plan(keep), rule=rule, start=start, held=held, flops=flops, tokens=tokens)


def costs(layouts: Sequence[Layout], shape: DecoderShape, plan: Plan, start: int) -> tuple[float, float]:
    """FLOPs of the prefill as a share of the unpruned model's, and audio and video tokens left from layer `start` on.

    Means over prompts.
    """
    ratios, counts = [], []
    for layout in layouts:
        tokens = plan.tokens(layout, shape.layers)
        full = prefill_flops(shape, [len(layout)] * shape.layers)
        ratios.append(prefill_flops(shape, tokens) / full)
        counts.append(tokens[start] - layout.count(Modality.TEXT))
    return float(np.mean(ratios)), float(np.mean(counts))


def _within(evidence: Evidence, shape: DecoderShape, criterion: Criterion, plan: Plan, start: int) -> bool:
    flops, tokens = costs(evidence.layouts, shape, plan, start)
    return tokens <= criterion.tokens if criterion.tokens is not None else flops <= (criterion.budget or 0)


def _planned(criterion: Criterion, rule: str, start: int) -> Callable[[Keep], Plan]:
    def plan(keep: Keep) -> Plan:
        whole = fastav(keep, start=start, drop=criterion.drop, name="calibrated")
        if rule != "rollout":
            return whole
        first, *fine = whole.steps
        return Plan((Step(layers=first.layers, method="rollout", keep=keep), *fine), whole.name)

    return plan


def _rules(evidence: Evidence, rule: str, start: int) -> tuple[int, Kept]:
    """How many settings a rule has, from that which keeps least to that which keeps most, and each of them."""
    if rule == "first":
        return _first(evidence, start)
    if rule == "even":
        return 1000, partial(_even, evidence, start)
    if rule == "rollout":
        return 999, lambda setting: (_each(evidence, Share((setting + 1) / 1000)), None)
    if rule == "frames":
        frames = [int(layout.frame.max(initial=-1)) for layout in evidence.layouts if layout.count(*MEDIA)]
        if not all(_framed(layout) for layout in evidence.layouts):
            return 0, _nothing  # audio that belongs to no frame would go whole
        return max(frames), lambda setting: _held(evidence, start, Frames(setting + 1))
    longest = max(map(len, evidence.layouts))
    earliest = min(int(np.isin(layout.modality, MEDIA).argmax()) for layout in evidence.layouts)
    return longest - earliest - 1, lambda setting: _held(evidence, start, Before(earliest + setting + 1))


def _nothing(setting: int) -> tuple[Keep, float | None]:
    raise IndexError(setting)


def _framed(layout: Layout) -> bool:
    return bool((layout.frame[np.isin(layout.modality, MEDIA)] >= 0).all())


def _each(evidence: Evidence, budget: Budget) -> Keep:
    return Keep(**{m.label: budget for m in MEDIA if m in evidence.present()})  # pyright: ignore[reportArgumentType]


def _first(evidence: Evidence, start: int) -> tuple[int, Kept]:
    """By the number of tokens: of each modality the first ones, in the split that holds the most rollout."""
    gains = {m: _gains(evidence, m, start) for m in MEDIA if m in evidence.present()}
    # adding the token that holds most keeps every split best as long as weights fall; where they rise again, whole
    # runs are taken by what they hold on average
    runs = sorted((run for m, gain in gains.items() for run in _runs(m, gain)), key=lambda run: -run[2])
    order = [modality for modality, length, _ in runs for _ in range(length)]
    total = sum(float(gain.sum()) for gain in gains.values())

    def kept(setting: int) -> tuple[Keep, float | None]:
        counts = {m: order[: setting + 1].count(m) for m in gains}
        held = sum(float(gains[m][:count].sum()) for m, count in counts.items())
        budgets = {m.label: Tokens(count) for m, count in counts.items() if count < len(gains[m])}
        return Keep(**budgets), held / total  # pyright: ignore[reportArgumentType]

    return len(order) - 1, kept


def _even(evidence: Evidence, start: int, setting: int) -> tuple[Keep, float]:
    """The first tokens of each modality that hold `setting` thousandths of what all of it holds, at least one."""
    gains = {m: _gains(evidence, m, start) for m in MEDIA if m in evidence.present()}
    counts = {m: int(np.searchsorted(gain.cumsum(), setting / 1000 * gain.sum())) + 1 for m, gain in gains.items()}
    held = sum(float(gains[m][:count].sum()) for m, count in counts.items())
    kept = {m.label: Tokens(count) for m, count in counts.items() if count < len(gains[m])}
    if not kept:  # what is last may hold nothing
        most = max(gains, key=lambda m: len(gains[m]))
        kept = {most.label: Tokens(len(gains[most]) - 1)}
    return Keep(**kept), held / sum(float(gain.sum()) for gain in gains.values())


def _gains(evidence: Evidence, modality: Modality, start: int) -> np.ndarray:
    """Of the k-th token of a modality, the rollout that it holds where the cut is made, as a mean over all prompts."""
    moments = evidence.profiles["order", modality]
    mean = moments.mean[KINDS.index("rollout"), QUERIES.index("last"), start - 1]
    return mean * moments.count / len(evidence.layouts)


def _runs(modality: Modality, gains: np.ndarray) -> list[tuple[Modality, int, float]]:
    """Lengths and means of the runs whose means fall: the steps of the least concave function above the sum."""
    runs: list[tuple[int, float]] = []
    for gain in gains:
        length, total = 1, float(gain)
        while runs and runs[-1][1] * length <= total * runs[-1][0]:
            before = runs.pop()
            length, total = length + before[0], total + before[1]
        runs.append((length, total))
    return [(modality, length, total / length) for length, total in runs]


def _held(evidence: Evidence, start: int, budget: Budget) -> tuple[Keep, float]:
    """Audio and video together under one budget, and the rollout that its tokens hold."""
    moments = evidence.profiles["position", None]
    mean = moments.mean[KINDS.index("rollout"), QUERIES.index("last"), start - 1]
    shares = []
    for layout in evidence.layouts:
        media = np.flatnonzero(np.isin(layout.modality, MEDIA))
        kept = media[: budget.tokens(layout, MEDIA, len(media))]
        shares.append(mean[kept].sum() / mean[media].sum())
    return Keep(media=budget), float(np.mean(shares))


def _unreachable(
    evidence: Evidence, shape: DecoderShape, criterion: Criterion, rules: Sequence[str], start: int
) -> tuple[str, str]:
    """Why no rule keeps so little, and what could be asked for."""
    least = []
    for rule in rules:
        settings, kept = _rules(evidence, rule, start)
        if settings:
            least.append(costs(evidence.layouts, shape, _planned(criterion, rule, start)(kept(0)[0]), start))
    if not least:
        return f"the rule {rules[0]} does not fit these prompts", "try the rule auto"
    flops, tokens = min(least)
    wanted = f"{criterion.tokens} tokens" if criterion.tokens is not None else f"{criterion.budget:.1%} of the FLOPs"
    there = f"{tokens:.0f} tokens" if criterion.tokens is not None else f"{flops:.1%}"
    return (
        f"{wanted} cannot be reached from layer {start} on: the least is {there}",
        "give a larger budget, an earlier start or a larger drop",
    )
