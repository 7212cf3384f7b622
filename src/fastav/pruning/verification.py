"""Verification that a plan took effect: the tokens that every layer ran on or stores, against the plan's counts."""

from collections.abc import Sequence

from fastav.errors import PlanNotApplied

HINT = "fastav does not work with the installed versions: use those that README names, and report this"


def not_applied(difference: str) -> PlanNotApplied:
    """An error that states a difference from the plan."""
    return PlanNotApplied(f"the plan did not take effect: {difference}", HINT)


def require_applied(planned: Sequence[int], actual: Sequence[int], what: str = "cache holds {} tokens") -> None:
    """Compare one count per layer; host integers, so that nothing waits for a device.

    planned, actual: counts of each layer, in order. what: the description of a layer's count, for the message.
    Raises: PlanNotApplied at the first layer that differs.
    """
    if len(planned) != len(actual):
        raise not_applied(f"it is for {len(planned)} layers, {len(actual)} were seen")
    for layer, (expected, count) in enumerate(zip(planned, actual, strict=True)):
        if expected != count:
            raise not_applied(f"layer {layer}'s {what.format(count)}, and by the plan {expected}")
