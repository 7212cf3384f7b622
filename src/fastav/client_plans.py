"""Plans that clients of a server send with a request, which other requests wait for."""

from fastav.adapter import ModelAdapter, plan_named
from fastav.errors import PlanError
from fastav.plan import Plan

MAX_LENGTH, MAX_STEPS, MAX_OPTION = 16_384, 32, 1024


def client_plan(text: str, adapter: ModelAdapter) -> Plan:
    """The plan that a client names: a preset of the model, a recipe, or a plan's JSON.

    It is bounded in its characters, steps and options. Names of files are refused, as files belong to the server.
    Raises: PlanError, UnknownName.
    """
    if len(text) > MAX_LENGTH:
        raise PlanError(f"a request's plan may have {MAX_LENGTH:,} characters, got {len(text):,}")
    if text.lstrip().startswith("{"):
        plan = Plan.from_json(text)
        if len(plan.steps) > MAX_STEPS or _largest_option(plan) > MAX_OPTION:
            raise PlanError(f"a request's plan may have {MAX_STEPS} steps, and options up to {MAX_OPTION:,}")
        return plan
    if text.endswith(".json"):
        raise PlanError("a request cannot name a file on the server", "send the plan's JSON itself")
    return plan_named(text, adapter)


def _largest_option(plan: Plan) -> float | int:
    """The largest number among the options of a plan's methods; 0 if there is none."""
    numbers = [value for step in plan.steps for value in step.options.values() if isinstance(value, float | int)]
    return max(numbers, default=0)
