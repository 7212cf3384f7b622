"""Options of the command line that change a plan."""

from fastav.cli._types import ModelAdapter, Plan, PreTrainedConfig, Step
from fastav.errors import PlanError


def share(text: str) -> float:
    """A share in [0, 1) from `20`, `20%` or `0.2`. A number of 1 or more is a percentage.  Raises: PlanError."""
    number = text.strip()
    try:
        value = float(number.removesuffix("%"))
    except ValueError:
        value = -1.0
    percent = number.endswith("%") or value >= 1
    if not 0 <= value < (100 if percent else 1):
        raise PlanError(f"--drop must be at least 0 and below 100 percent, got {text!r}", "write 20, 20% or 0.2")
    return round(value / 100, 12) if percent else value


def aimed(name: str, retention: str | None) -> str:
    """The name of a plan with the target of `--retention`, which `plan_named` reads.

    Raises: PlanError for a retention that cannot be read, and for a plan that prunes nothing.
    """
    if retention is None:
        return name
    from fastav.target import Target

    target = Target.from_suffix(f"r={retention.strip()}")
    if name == "none":
        raise PlanError("the plan 'none' prunes nothing, so it cannot have a --retention", "choose a plan that prunes")
    return f"{name}@{target.suffix}"


def tune(
    plan: Plan,
    *,
    drop: str | None = None,
    start: str | None = None,
    keep_audio: int | None = None,
    before: int | None = None,
    exempt_text: bool | None = None,
) -> Plan:
    """The plan with some of FastAV's settings changed. Steps with other methods stay unchanged.

    Raises: PlanError if settings contradict each other, or if the plan has no global cut to change.
    """
    from fastav import presets
    from fastav.budgets import Before, Tokens
    from fastav.plan import Keep, Plan

    if keep_audio is not None and before is not None:
        raise PlanError("--keep-audio and --before both set the global cut", "give only one of them")
    if all(setting is None for setting in (drop, start, keep_audio, before, exempt_text)):
        return plan
    global_cut = next((step for step in plan.steps if step.method == "position"), None)
    fine_cuts = next((step for step in plan.steps if step.method == "last-query"), None)
    if global_cut is None:
        raise PlanError(
            f"the plan {plan.name or plan.fingerprint!r} has no global cut to change",
            "--drop, --start, --keep-audio, --before and --no-exempt-text change FastAV plans only",
        )
    keep = global_cut.keep
    if keep_audio is not None:
        keep = Keep(audio=Tokens(keep_audio))
    if before is not None:
        keep = Keep(media=Before(before))
    new = presets.fastav(
        keep,
        start=global_cut.layers if start is None else _parse_layer(start),
        drop=_dropped_share(fine_cuts) if drop is None else share(drop),
        exempt_text=(fine_cuts is None or fine_cuts.keep.all is None) if exempt_text is None else exempt_text,
    )
    others = tuple(step for step in plan.steps if step not in (global_cut, fine_cuts))
    return Plan((*others, *new.steps), plan.name, target=plan.target)


def check_runnable(plan: Plan, config: PreTrainedConfig, adapter: ModelAdapter) -> None:
    """Refuse a plan that cannot run on the model.  Raises: PlanError, UnsupportedPlan, UnsupportedModel."""
    from fastav.method import Signal, method_of
    from fastav.registry import ENGINES

    methods = [method_of(step) for step in plan.steps]
    if not any(Signal.GIVEN in method.needs for method in methods):  # scores that come from a caller in Python
        ENGINES["transformers"].check(config, plan, adapter=adapter)


def _parse_layer(text: str) -> int | str:
    if text == "middle":
        return text
    if not text.isdecimal():
        raise PlanError(f"--start must be a layer's number or middle, got {text!r}")
    return int(text)


def _dropped_share(fine_cuts: Step | None) -> float:
    from fastav.budgets import Share

    if fine_cuts is None:
        return 0.0
    budget = fine_cuts.keep.media or fine_cuts.keep.clip or fine_cuts.keep.all
    if not isinstance(budget, Share):
        raise PlanError("the fine cuts of the plan do not keep a share of the tokens", "give --drop")
    return round(1 - budget.share, 12)
