"""Whether a plan took effect: what every layer ran on or holds after a step, against what the plan says of it."""

from collections.abc import Sequence

from fastav.errors import PlanNotApplied

HINT = "this installation does not fit fastav: use the versions that README names, and report this"


def not_applied(words: str) -> PlanNotApplied:
    """The error that says what differs from the plan."""
    return PlanNotApplied(f"the plan did not take effect: {words}", HINT)


def require_applied(planned: Sequence[int], found: Sequence[int], what: str = "cache holds {} tokens") -> None:
    """Compare one count of every layer; host integers, so that nothing waits for a device.

    planned, found: of each layer, in order. what: a layer's count in words, for the message.
    Raises: PlanNotApplied at the first layer that differs.
    """
    if len(planned) != len(found):
        raise not_applied(f"it is for {len(planned)} layers, {len(found)} were seen")
    for layer, (expected, count) in enumerate(zip(planned, found, strict=True)):
        if expected != count:
            raise not_applied(f"layer {layer}'s {what.format(count)}, and by the plan {expected}")
