"""Plans as the command line names and varies them."""

from typing import Any

from fastav.errors import PlanError


def share(text: str) -> float:
    """A share of 1, from `20`, `20%` or `0.2`; from 1 on a bare number is a percentage.  Raises: PlanError."""
    number = text.strip()
    try:
        value = float(number.removesuffix("%"))
    except ValueError:
        value = -1.0
    percent = number.endswith("%") or value >= 1
    if not 0 <= value < (100 if percent else 1):
        raise PlanError(f"--drop must be at least 0 and below 100 percent, got {text!r}", "write 20, 20% or 0.2")
    return round(value / 100, 12) if percent else value


def tuned(
    plan: Any,
    *,
    drop: str | None = None,
    start: str | None = None,
    keep_audio: int | None = None,
    before: int | None = None,
    exempt_text: bool | None = None,
) -> Any:
    """The plan with some of FastAV's settings changed; its steps by other methods stay as they are.

    Raises: PlanError if settings contradict each other, or the plan has no global cut to change.
    """
    from fastav import presets
    from fastav.plan import Before, Keep, Plan, Tokens

    if keep_audio is not None and before is not None:
        raise PlanError("--keep-audio and --before are two wordings of the same cut", "give one of them")
    if all(setting is None for setting in (drop, start, keep_audio, before, exempt_text)):
        return plan
    coarse = next((step for step in plan.steps if step.method == "position"), None)
    fine = next((step for step in plan.steps if step.method == "last-query"), None)
    if coarse is None:
        raise PlanError(
            f"the plan {plan.name or plan.fingerprint!r} has no global cut to vary",
            "--drop, --start, --keep-audio, --before and --no-exempt-text change FastAV plans only",
        )
    keep = coarse.keep
    if keep_audio is not None:
        keep = Keep(audio=Tokens(keep_audio))
    if before is not None:
        keep = Keep(media=Before(before))
    varied = presets.fastav(
        keep,
        start=coarse.layers if start is None else _layer(start),
        drop=_dropped(fine) if drop is None else share(drop),
        exempt_text=(fine is None or fine.keep.all is None) if exempt_text is None else exempt_text,
    )
    others = tuple(step for step in plan.steps if step not in (coarse, fine))
    return Plan((*others, *varied.steps), plan.name)


def require_sound(plan: Any, config: Any) -> None:
    """Refuse a plan that could not run.  Raises: PlanError, UnsupportedPlan, UnsupportedModel."""
    from fastav.method import method_of
    from fastav.registry import ENGINES

    for step in plan.steps:
        method_of(step)
    if not any(step.method == "given" for step in plan.steps):  # whose scores only a caller can bring
        ENGINES["transformers"].check(config, plan)


def _layer(text: str) -> int | str:
    if text == "middle":
        return text
    if not text.isdecimal():
        raise PlanError(f"--start must be a layer's number or middle, got {text!r}")
    return int(text)


def _dropped(fine: Any) -> float:
    if fine is None:
        return 0.0
    return round(1 - (fine.keep.media or fine.keep.clip or fine.keep.all).share, 12)
