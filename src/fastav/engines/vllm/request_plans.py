"""Which plans the requests of a server may name: the entry `requests` of its configuration."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastav.errors import PlanError

ANY = "any"
HINT = 'false, a list of names such as ["fastav", "none"], or "any", which takes JSON too'


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPlans:
    """The plans that requests may name.

    names: None for all presets of the model and all recipes. takes_json: whether a request may send a plan's JSON.
    """

    names: tuple[str, ...] | None = None
    takes_json: bool = False

    def check(self, plan_spec: Any) -> None:
        """Refuse a plan that the operator has not allowed.

        plan_spec: what the request names; None if nothing. Whether there is such a plan is not checked here.
        Raises: PlanError.
        """
        if plan_spec is None or not isinstance(plan_spec, str):
            return
        if self.names == ():
            raise PlanError("this server does not let requests choose a plan", "leave fastav out of the request")
        is_json = plan_spec.lstrip().startswith("{")
        if self.names is not None and plan_spec not in self.names:
            shown = "a plan's JSON" if is_json else repr(plan_spec[:80])
            raise PlanError(f"this server does not let requests choose {shown}", f"it takes {', '.join(self.names)}")
        if is_json and not self.takes_json:
            raise PlanError(
                "this server takes plans of requests by name, not as JSON",
                'name a preset or a recipe; the operator can allow JSON with "requests": "any"',
            )


def request_plans(entry: Any) -> RequestPlans:
    """The plans that requests may name, by the entry for fastav in `additional_config`.

    Its key `requests` is false (no plan), a list of names (these), `"any"` (all names, and JSON), or is missing (all
    names). Raises: PlanError.
    """
    if not isinstance(entry, Mapping) or "requests" not in entry:
        return RequestPlans()
    value = entry["requests"]
    if value is False:
        return RequestPlans(names=())
    if value == ANY:
        return RequestPlans(takes_json=True)
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
        return RequestPlans(names=tuple(value))
    raise PlanError(f'"requests" of fastav cannot be {json.dumps(value, default=str)}', HINT)
