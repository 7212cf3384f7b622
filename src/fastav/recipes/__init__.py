"""Published approaches as plans for any model, one function per file: `fastv`, or `fastv@0.25` for another budget."""

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import cast

from fastav.errors import PlanError
from fastav.plan import Plan
from fastav.registry import RECIPES
from fastav.target import Target


def has_budget(name: str) -> bool:
    """Whether a recipe takes a share after @.  Raises: UnknownName."""
    return "keep" in signature(RECIPES[name]).parameters


def recipe(text: str) -> Plan:
    """The plan of a recipe; a number after @ is its `keep`, the share of tokens to keep at its first cut.

    `@r=0.25`, `@flops=0.4` and `@kv=0.3` are targets, for which the plan's budgets are scaled (`fastav.target`).
    Raises: UnknownName, PlanError.
    """
    name, at, keep = text.partition("@")
    make: Callable[..., Plan] = RECIPES[name]
    if not at:
        return make()
    if "=" in keep:
        return replace(_targeted(name, keep), name=text)
    if not has_budget(name):
        options = ", ".join(signature(make).parameters) or "none"
        raise PlanError(f"the recipe {name!r} has no budget to set with @", f"its arguments, in Python: {options}")
    try:
        share = float(keep)
    except ValueError:
        raise PlanError(f"{text!r} has no number after the @", f"write {name}@0.25 to keep a quarter") from None
    return replace(make(keep=share), name=text)


def _targeted(name: str, suffix: str) -> Plan:
    """The plan of a recipe with a target; a recipe with an argument `retention` makes its own schedule for one."""
    target, make = Target.from_suffix(suffix), cast("Callable[..., Plan]", RECIPES[name])
    if isinstance(target.retention, int | float) and "retention" in signature(make).parameters:
        return make(retention=target.retention)
    return make().aiming_at(target)
