"""From evidence to a plan: at which layer to cut, which tokens stay, and how many.

Source: arXiv:2601.13143, section 3: attention concentrates from the middle layers on, rollout shows on which tokens,
and a fixed rule follows from it. The paper does not say how it derives the rule; the criteria here are ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastav.budgets import Before, Budget, Frames, Share, Tokens
from fastav.calibrate.evidence import KINDS, Evidence
from fastav.errors import CalibrationError
from fastav.flops import DecoderShape, prefill_flops
from fastav.layout import MEDIA, Layout, Modality
from fastav.plan import Keep, Plan, Step
from fastav.presets import fastav
from fastav.trace import QUERIES

RULES = ("even", "first", "frames", "before", "auto", "rollout")
STARTS = ("middle", "concentration")


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """How a plan follows from evidence.

    budget: the target FLOPs of the prefill, as a share of the unpruned model's. tokens: instead of `budget`, the number
    of audio and video tokens that stay at the global cut, as a mean over prompts. start: the layer of the global cut.
    `middle`: half the depth. `concentration`: find the first layer from which on the last query's attention stays above
    the middle of its lowest and highest concentration (`fastav.calibrate.evidence.TOP`); the cut is at the layer after
    it. rule: the tokens that stay. `even`: the first tokens of each modality, with the same share of its rollout.
    `first`: the first tokens of each modality, split so that together they have the most rollout. `frames`: the tokens
    of the first frames. `before`: the tokens before a position. `auto`: the one of the last three whose tokens have the
    most rollout; it can drop a modality with little rollout entirely. `rollout`: no fixed rule; the same share of each
    modality, by the rollout of each prompt. drop: the share of the remaining tokens that is dropped at every later
    layer, by the last query.

    Raises: CalibrationError for a share outside (0, 1), and for both budgets or neither.
    """

    budget: float | None = 0.56
    tokens: int | None = None
    start: str | int = "middle"
    rule: str = "even"
    drop: float | int = 0.2

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.tokens is None):
            raise CalibrationError("give either a FLOPs budget or a number of tokens")
        if self.budget is not None and not 0 < self.budget < 1:
            raise CalibrationError(f"a budget must be in (0, 1), got {self.budget:g}", "0.56 is 56 % of the FLOPs")
        if self.tokens is not None and self.tokens < 1:
            raise CalibrationError(f"the number of tokens must be at least 1, got {self.tokens}")
        if self.rule not in RULES:
            raise CalibrationError(f"there is no rule {self.rule!r}", f"the rules are {', '.join(RULES)}")
        if self.start not in STARTS and (not isinstance(self.start, int) or self.start is True):
            raise CalibrationError(f"start must be a layer, middle or concentration, got {self.start!r}")
        if not 0 <= self.drop < 1:
            raise CalibrationError(f"drop must be in [0, 1), got {self.drop:g}", "0.2 drops 20 %")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A plan, and the evidence for it.

    held: the share of the rollout of audio and video at the global cut that is on tokens that stay, from means over
    prompts; None for the rule `rollout`, because means do not know the heaviest tokens of each prompt. flops: of the
    prefill, as a share of the unpruned model's. tokens: audio and video tokens that stay at the global cut. Both are
    means over prompts.
    """

    plan: Plan
    rule: str
    start: int
    held: float | None
    flops: float
    tokens: float


def choose(evidence: Evidence, shape: DecoderShape, criterion: Criterion) -> Choice:
    """The plan that follows from evidence by a criterion.

    Raises: CalibrationError if the budget cannot be reached, the layer does not exist, or no prompt has audio or video.
    """
    if not any(layout.count(*MEDIA) for layout in evidence.layouts):
        raise CalibrationError("none of the prompts has audio or video", "give clips with video or sound")
    start = start_layer(evidence, shape.layers, criterion.start)
    rules = ("first", "frames", "before") if criterion.rule == "auto" else (criterion.rule,)
    choices = [choice for rule in rules if (choice := _fit_rule(evidence, shape, criterion, rule, start)) is not None]
    if not choices:
        raise CalibrationError(*_unreachable(evidence, shape, criterion, rules, start))
    return max(choices, key=lambda choice: round(choice.held or 0.0, 9))  # the first of equals


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
    steady = int(np.flatnonzero(~high).max(initial=-1)) + 1  # from this layer on it is always high
    return min(steady + 1, depth - 1)


Settings = Sequence[Keep] | None  # settings of a rule, smallest first; None if the rule does not fit


def _fit_rule(evidence: Evidence, shape: DecoderShape, criterion: Criterion, rule: str, start: int) -> Choice | None:
    """The largest setting of a rule within the budget; None if there is none, or if the rule does not fit."""
    settings, plan = _settings(evidence, rule, start), _plan_maker(criterion, rule, start)
    if settings is None or not _is_within(evidence, shape, criterion, plan(settings[0]), start):
        return None
    low, high = 0, len(settings) - 1
    while low < high:  # settings are in ascending order
        middle = (low + high + 1) // 2
        if _is_within(evidence, shape, criterion, plan(settings[middle]), start):
            low = middle
        else:
            high = middle - 1
    flops, tokens = costs(evidence.layouts, shape, plan(settings[low]), start)
    held = None if rule == "rollout" else _rollout_share(evidence, start, settings[low])
    return Choice(plan=plan(settings[low]), rule=rule, start=start, held=held, flops=flops, tokens=tokens)


def costs(layouts: Sequence[Layout], shape: DecoderShape, plan: Plan, start: int) -> tuple[float, float]:
    """FLOPs of the prefill as a share of the unpruned model's, and the audio and video tokens from layer `start` on.

    Both are means over prompts.
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
            )  # tokens without a frame would all be dropped
            return [Keep(media=Frames(number)) for number in range(1, frames + 1)] or None if in_frames else None
        case "before":
            first = min(int(np.isin(layout.modality, MEDIA).argmax()) for layout in evidence.layouts)
            return [
                Keep(media=Before(positions)) for positions in range(first + 1, max(map(len, evidence.layouts)))
            ] or None
    raise CalibrationError(f"there is no rule {rule!r}", f"the rules are {', '.join(RULES)}")


def _all_in_frames(layout: Layout) -> bool:
    return bool((layout.frame[np.isin(layout.modality, MEDIA)] >= 0).all())


def _keep_each(budgets: Mapping[Modality, Budget]) -> Keep:
    return Keep(**{m.label: budget for m, budget in budgets.items()})  # pyright: ignore[reportArgumentType]


def _by_share(gains: Mapping[Modality, np.ndarray]) -> list[Modality]:
    """The modality whose next token stays, step by step, so that all modalities keep the same share of their weight."""
    shares = ((m, gain.cumsum() / max(gain.sum(), 1e-30)) for m, gain in gains.items())
    return [m for _, m in sorted((share, m) for m, cumulative in shares for share in cumulative.tolist())]


def _by_weight(gains: Mapping[Modality, np.ndarray]) -> list[Modality]:
    """The modality whose next token stays, step by step, so that the tokens that stay have the most weight.

    If weights fall from token to token, taking the heaviest next token is optimal for every number of tokens. Where
    weights rise again, runs of tokens are taken as a whole, by their mean.
    """
    runs = sorted((run for m, gain in gains.items() for run in _runs(m, gain)), key=lambda run: -run[2])
    return [m for m, length, _ in runs for _ in range(length)]


def _gains(evidence: Evidence, modality: Modality, start: int) -> np.ndarray:
    """The rollout of the k-th token of a modality at the global cut, as a mean over all prompts."""
    moments = evidence.profiles["order", modality]
    mean = moments.mean[KINDS.index("rollout"), QUERIES.index("last"), start - 1]
    return mean * moments.count / len(evidence.layouts)


def _runs(modality: Modality, gains: np.ndarray) -> list[tuple[Modality, int, float]]:
    """Lengths and means of runs with falling means: the steps of the least concave function above the running sum."""
    runs: list[tuple[int, float]] = []
    for gain in gains:
        length, total = 1, float(gain)
        while runs and runs[-1][1] * length <= total * runs[-1][0]:
            previous = runs.pop()
            length, total = length + previous[0], total + previous[1]
        runs.append((length, total))
    return [(modality, length, total / length) for length, total in runs]


def _rollout_share(evidence: Evidence, start: int, keep: Keep) -> float:
    """The share of the rollout of audio and video at the global cut that is on the first tokens that stay."""
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
    """The error message and hint for a budget that no rule can reach."""
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
