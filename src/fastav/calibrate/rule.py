"""From evidence to a plan: where to cut, which tokens stay, how many.

Source: arXiv:2601.13143, section 3: attention concentrates from the middle layers on, rollout shows on which tokens,
and a fixed rule is read off it. How the paper reads it is not stated; the criteria here are ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastav.calibrate.evidence import KINDS, Evidence
from fastav.errors import CalibrationError
from fastav.flops import DecoderShape, prefill_flops
from fastav.layout import MEDIA, Layout, Modality
from fastav.plan import Before, Budget, Frames, Keep, Plan, Share, Step, Tokens
from fastav.presets import fastav
from fastav.trace import QUERIES

RULES = ("even", "first", "frames", "before", "auto", "rollout")
STARTS = ("middle", "concentration")


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """How a plan is read off evidence.

    budget: FLOPs of the prefill to reach, as a share of the unpruned model's. tokens: instead of `budget`, how many
    tokens of audio and video are to stay at the global cut, as a mean over prompts.
    start: the layer of the global cut. `concentration`: the layer behind the first one from which on the attention of
    the last query is never less concentrated (`fastav.calibrate.evidence.TOP`) than half-way from its least to its
    greatest.
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
    start: str | int = "middle"
    rule: str = "even"
    drop: float | int = 0.2

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.tokens is None):
            raise CalibrationError("give either a budget of FLOPs or a number of tokens")
        if self.budget is not None and not 0 < self.budget < 1:
            raise CalibrationError(f"a budget must be in (0, 1), got {self.budget:g}", "0.56 is 56 % of the FLOPs")
        if self.tokens is not None and self.tokens < 1:
            raise CalibrationError(f"the number of tokens must be at least 1, got {self.tokens}")
        if self.rule not in RULES:
            raise CalibrationError(f"there is no rule {self.rule!r}", f"rules: {', '.join(RULES)}")
        if self.start not in STARTS and (not isinstance(self.start, int) or self.start is True):
            raise CalibrationError(f"start must be a layer, middle or concentration, got {self.start!r}")
        if not 0 <= self.drop < 1:
            raise CalibrationError(f"drop must be in [0, 1), got {self.drop:g}", "0.2 drops 20 %")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A plan and what speaks for it.

    held: of the rollout that audio and video have where the global cut is made, the share on tokens that stay, by means
    over prompts (of the rule `rollout`, what the heaviest tokens of each prompt hold is not known from means: None).
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
    choices = [choice for rule in rules if (choice := _fit_rule(evidence, shape, criterion, rule, start)) is not None]
    if not choices:
        raise CalibrationError(*_unreachable(evidence, shape, criterion, rules, start))
    return max(choices, key=lambda choice: round(choice.held or 0.0, 9))  # of equals the first


def start_layer(evidence: Evidence, depth: int, start: str | int) -> int:
    """The layer of the global cut.  Raises: CalibrationError."""
    if start == "middle":
        return depth // 2
    if isinstance(start, int):
        if not 0 < start < depth:
            raise CalibrationError(f"the start must be a layer from 1 to {depth - 1}, got {start}")
        return start
    concentration = evidence.concentration.mean[KINDS.index("attention"), QUERIES.index("last"), :, 0]
    high = concentration >= (concentration.min() + concentration.max()) / 2
    steady = int(np.flatnonzero(~high).max(initial=-1)) + 1  # the first layer from which on it is always high
    return min(steady + 1, depth - 1)


Settings = Sequence[Keep] | None  # of a rule, from that which keeps least; None where it does not fit


def _fit_rule(evidence: Evidence, shape: DecoderShape, criterion: Criterion, rule: str, start: int) -> Choice | None:
    """The most that a rule can keep within the budget; None if even the least is too much, or the rule does not fit."""
    settings, plan = _settings(evidence, rule, start), _plan_maker(criterion, rule, start)
    if settings is None or not _is_within(evidence, shape, criterion, plan(settings[0]), start):
        return None
    low, high = 0, len(settings) - 1
    while low < high:  # what is kept grows from setting to setting
        middle = (low + high + 1) // 2
        if _is_within(evidence, shape, criterion, plan(settings[middle]), start):
            low = middle
        else:
            high = middle - 1
    flops, tokens = costs(evidence.layouts, shape, plan(settings[low]), start)
    held = None if rule == "rollout" else _rollout_share(evidence, start, settings[low])
    return Choice(plan=plan(settings[low]), rule=rule, start=start, held=held, flops=flops, tokens=tokens)


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


def _is_within(evidence: Evidence, shape: DecoderShape, criterion: Criterion, plan: Plan, start: int) -> bool:
    flops, tokens = costs(evidence.layouts, shape, plan, start)
    return tokens <= criterion.tokens if criterion.tokens is not None else flops <= (criterion.budget or 0)


def _plan_maker(criterion: Criterion, rule: str, start: int) -> Callable[[Keep], Plan]:
    def plan(keep: Keep) -> Plan:
        full_plan = fastav(keep, start=start, drop=criterion.drop, name="calibrated")
        if rule != "rollout":
            return full_plan
        first, *fine = full_plan.steps
        return Plan((Step(layers=first.layers, method="rollout", keep=keep), *fine), full_plan.name)

    return plan


def _settings(evidence: Evidence, rule: str, start: int) -> Settings:
    modalities = [m for m in MEDIA if m in evidence.present()]
    match rule:
        case "rollout":
            shares = (Share(thousandths / 1000) for thousandths in range(1, 1000))
            return [_keep_each(dict.fromkeys(modalities, share)) for share in shares]
        case "even" | "first":
            gains = {m: _gains(evidence, m, start) for m in modalities}
            order = _by_share(gains) if rule == "even" else _by_weight(gains)
            counts = [{m: order[:tokens].count(m) for m in modalities} for tokens in range(1, len(order))]
            return [_keep_each({m: Tokens(n) for m, n in one.items() if n < len(gains[m])}) for one in counts] or None
        case "frames":
            frames = max(int(layout.frame.max(initial=-1)) for layout in evidence.layouts)
            in_frames = all(
                _all_in_frames(layout) for layout in evidence.layouts
            )  # what belongs to none would go whole
            return [Keep(media=Frames(number)) for number in range(1, frames + 1)] or None if in_frames else None
        case "before":
            first = min(int(np.isin(layout.modality, MEDIA).argmax()) for layout in evidence.layouts)
            return [
                Keep(media=Before(positions)) for positions in range(first + 1, max(map(len, evidence.layouts)))
            ] or None
    raise CalibrationError(f"there is no rule {rule!r}", f"rules: {', '.join(RULES)}")


def _all_in_frames(layout: Layout) -> bool:
    return bool((layout.frame[np.isin(layout.modality, MEDIA)] >= 0).all())


def _keep_each(budgets: Mapping[Modality, Budget]) -> Keep:
    return Keep(**{m.label: budget for m, budget in budgets.items()})  # pyright: ignore[reportArgumentType]


def _by_share(gains: Mapping[Modality, np.ndarray]) -> list[Modality]:
    """Whose next token is kept, one after another, so that all modalities keep the same share of what each holds."""
    shares = ((m, gain.cumsum() / max(gain.sum(), 1e-30)) for m, gain in gains.items())
    return [m for _, m in sorted((share, m) for m, cumulative in shares for share in cumulative.tolist())]


def _by_weight(gains: Mapping[Modality, np.ndarray]) -> list[Modality]:
    """Whose next token is kept, one after another, so that what is kept holds the most.

    Taking the token that holds most keeps every split best as long as weights fall; where they rise again, whole runs
    are taken by what they hold on average.
    """
    runs = sorted((run for m, gain in gains.items() for run in _runs(m, gain)), key=lambda run: -run[2])
    return [m for m, length, _ in runs for _ in range(length)]


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
            previous = runs.pop()
            length, total = length + previous[0], total + previous[1]
        runs.append((length, total))
    return [(modality, length, total / length) for length, total in runs]


def _rollout_share(evidence: Evidence, start: int, keep: Keep) -> float:
    """Share of the rollout of audio and video, where the cut is made, that is on the first tokens that stay."""
    kept_weight, total = 0.0, 0.0
    for layout in evidence.layouts:
        positions = {m: np.flatnonzero(layout.modality == m) for m in MEDIA if layout.count(m)}
        counts = keep.counts(layout, {frozenset({m}): layout.count(m) for m in Modality})
        for m, tokens in positions.items():
            mean = evidence.profiles["order", m].mean[KINDS.index("rollout"), QUERIES.index("last"), start - 1]
            pool = next((pool for pool in counts if m in pool), None)
            n_kept = len(tokens)
            if pool is not None:
                first = np.flatnonzero(np.isin(layout.modality, list(pool)))[: counts[pool]]
                n_kept = int((layout.modality[first] == m).sum())
            kept_weight, total = kept_weight + float(mean[:n_kept].sum()), total + float(mean[: len(tokens)].sum())
    return kept_weight / total


def _unreachable(
    evidence: Evidence, shape: DecoderShape, criterion: Criterion, rules: Sequence[str], start: int
) -> tuple[str, str]:
    """Why no rule keeps so little, and what could be asked for."""
    settings_by_rule = {rule: settings for rule in rules if (settings := _settings(evidence, rule, start)) is not None}
    if not settings_by_rule:
        return f"the rule {rules[0]} does not fit these prompts", "try the rule even"
    least = (_plan_maker(criterion, rule, start)(settings[0]) for rule, settings in settings_by_rule.items())
    least = [costs(evidence.layouts, shape, plan, start) for plan in least]
    flops, tokens = min(least)
    budget_text = (
        f"{criterion.tokens} tokens" if criterion.tokens is not None else f"{criterion.budget:.1%} of the FLOPs"
    )
    least_text = f"{tokens:.0f} tokens" if criterion.tokens is not None else f"{flops:.1%}"
    return (
        f"{budget_text} cannot be reached from layer {start} on: the least is {least_text}",
        "give a larger budget, an earlier start or a larger drop",
    )
