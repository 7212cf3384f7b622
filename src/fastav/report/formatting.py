"""Plans, rules and numbers as text for the page."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from fastav.budgets import Before, Budget, Frames, Share, Tokens, Unpadded
from fastav.layout import MEDIA, Modality
from fastav.plan import Keep, Plan, Step

SPACE = "\N{NO-BREAK SPACE}"
RULES = {
    "even": "the first tokens of each modality with the same share of its rollout",
    "first": "the first tokens of each modality, split so that they have the most rollout together",
    "frames": "the tokens of the first frames",
    "before": "the tokens before one position",
    "rollout": "the same share of each modality, by the rollout of the prompt at hand",
}
METHOD_TEXTS = {  # which tokens a method keeps
    "rollout": "those that reach the last query most (rollout)",
    "last-query": "those that the last query attends to most",
}


def percent(share: float) -> str:
    """A share in percent: `59.9 %`."""
    return f"{100 * share:.1f}{SPACE}%"


def number(value: float) -> str:
    """A number: `1,496`, or `35.4` for a mean that is no integer."""
    return f"{value:,.0f}" if abs(value - round(value)) < 0.05 else f"{value:,.1f}"


def second(value: float) -> str:
    """Seconds: `2.13 s`, `178 s`."""
    return f"{round(value, 2):,g}{SPACE}s"


def plural(count: int, noun: str) -> str:
    """`1 clip`, `4 clips`."""
    return f"{count:,}{SPACE}{noun}{'' if count == 1 else 's'}"


def join_list(items: Sequence[str], last: str = "and") -> str:
    """A list in English: `audio, video and image`."""
    return f" {last} ".join(part for part in (", ".join(items[:-1]), items[-1]) if part) if items else ""


def plan(plan: Plan, depth: int, present: Sequence[Modality]) -> list[str]:
    """A sentence for every step of a plan, in a decoder of this depth, for prompts with these modalities."""
    return [sentence for step in plan.steps if (sentence := _step(step, depth, present))]


def _step(step: Step, depth: int, present: Sequence[Modality]) -> str:
    layers = step.layer_range(depth)
    if not layers:
        return ""
    if len(layers) == 1 and (first := layers[0]):
        prefix = f"Entering layer {first} of {depth}, "
    else:
        prefix = f"Entering each of the layers {layers[0]} to {layers[-1]}, " if len(layers) > 1 else "Before layer 0, "
    if (removal := _removal_text(step.keep, step.method, present)) is not None:
        return prefix + removal
    parts = [
        _budget_text(pool & {*present}, budget, step.method)
        for pool, budget in step.keep.pools().items()
        if pool & {*present}
    ]
    free_kinds = [m.label for m in MEDIA if m in present and not any(m in pool for pool in step.keep.pools())]
    parts += [f"all {join_list(free_kinds)} tokens"] if free_kinds else []
    kept_parts = [part for part in parts if not part.startswith("no ")]
    empty_parts = [part for part in parts if part.startswith("no ")]
    sentence = f"{join_list(kept_parts)} stay" if kept_parts else ""
    sentence += (
        f", and {join_list(empty_parts, 'or')}"
        if kept_parts and empty_parts
        else join_list(empty_parts, "or") + " stay"
        if empty_parts
        else ""
    )
    reason = METHOD_TEXTS.get(
        step.method, "" if step.method == "position" else f"as the method {step.method} scores them"
    )
    return f"{prefix}{sentence}{f': {reason}' if reason else ''}."


def _removal_text(keep: Keep, method: str, present: Sequence[Modality]) -> str | None:
    """The sentence of a cut that drops a small share of one pool: it names the dropped tokens."""
    (pool, budget), *more = keep.pools().items()
    if more or not isinstance(budget, Share) or budget.share < 0.5 or method == "rollout":
        return None
    least = "those that the last query attends to least" if method == "last-query" else f"by the method {method}"
    return f"{_share(1 - budget.share)} of the {_names(pool & {*present})} tokens that are left go: {least}."


def _budget_text(pool: frozenset[Modality], budget: Budget, method: str) -> str:
    names, first = _names(pool), "first " if method == "position" else ""
    match budget:
        case Tokens(0):
            return f"no {names} tokens"
        case Tokens(1):
            return f"the {first}{names} token" if first else f"one {names} token"
        case Tokens(count):
            return f"{'the ' if first else ''}{first}{count:,} {names} tokens"
        case Frames(1):
            return f"the {names} tokens of the first frame"
        case Frames(count):
            return f"the {names} tokens of the first {count:,} frames"
        case Before(position):
            return f"the {names} tokens before position {position:,}"
        case Share(share):
            return f"{'the first ' if first else ''}{_share(share)} of the {names} tokens"
        case Unpadded():
            return f"the {names} tokens that are no padding"
        case _:
            return f"{names} tokens by {budget}"


def _share(share: float) -> str:
    return f"{100 * share:.4g}{SPACE}%"


def _names(pool: frozenset[Modality]) -> str:
    return join_list([m.label for m in Modality if m in pool])


def budget(criterion: Mapping[str, Any]) -> str:
    """The budget of the calibration."""
    if criterion["tokens"] is not None:
        return f"{plural(criterion['tokens'], 'token')} of audio and video at the cut"
    return f"{_share(criterion['budget'])} of the FLOPs of the prefill"


def rule(requested: str, chosen: str) -> str:
    """The rule that was used."""
    return f"{RULES[chosen]} (“{chosen}”{', the fixed rule with the most rollout' if requested == 'auto' else ''})"


def start(requested: Any, layer: int) -> str:
    """The layer of the cut, and the reason for it."""
    why = {"middle": "half the depth", "concentration": "where attention has concentrated"}
    return f"layer {layer} ({why.get(requested, 'as asked')})"


def machine(machine: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    """The machine: `AMD EPYC, 2 cores; weights in float32 on cpu`."""
    parts = [machine.get("gpu"), machine.get("cpu"), plural(machine["cores"], "core") if machine.get("cores") else None]
    return f"{', '.join(part for part in parts if part)}; weights in {head['dtype']} on {head['device']}"


def date(text: str) -> str:
    """A date: `21 November 2026, 17:15 UTC`."""
    moment = datetime.fromisoformat(text)
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()
