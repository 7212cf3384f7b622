"""Whether a step of vLLM ran as the plan says: what attention was given, layer by layer, against the prompts' layouts.

What is planned comes from the plan, the layouts and vLLM's scheduler; what is found from the calls of each layer's
attention, behind everything that pruning changes. Both are host integers, so that no step waits for its device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from fastav.engines.vllm.passage import Passage
from fastav.plan_check import not_applied, require_applied


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """One call of a layer's attention.

    rows: of queries, with those that only fill a batch up. tokens: real ones. longest_query: the most tokens of one
    request. longest: the most tokens that the cache holds of one request, these included. lengths: that of every
    request, where it is known without waiting for the device.
    """

    rows: int
    tokens: int
    longest_query: int
    longest: int
    lengths: tuple[int, ...] | None = None


NO_CALL = LayerCall(rows=0, tokens=0, longest_query=0, longest=0)


class StepRecord:
    """What the layers of a decoder were given in one step.

    calls: of each layer's attention. slots: of each layer, how many places in the cache were named to be written.
    """

    def __init__(self, depth: int) -> None:
        self.calls: list[list[LayerCall]] = [[] for _ in range(depth)]
        self.slots = [0] * depth

    def clear(self) -> None:
        """Begin a step."""
        for calls in self.calls:
            calls.clear()
        self.slots = [0] * len(self.slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What a step must be.  after: tokens of each request in each layer's cache after it. rows: those it runs."""

    after: Int[np.ndarray, "requests layers"]
    rows: Int[np.ndarray, "requests layers"]
    total: int

    @classmethod
    def of(cls, passages: Sequence[Passage], computed: Sequence[int], tokens: Sequence[int]) -> "StepPlan":
        """Of requests that had so many tokens computed before, and run so many now, before any is dropped."""
        before = np.stack([one.lengths(done) for one, done in zip(passages, computed, strict=True)])
        both = zip(passages, computed, tokens, strict=True)
        after = np.stack([one.lengths(done + new) for one, done, new in both])
        return cls(after=after, rows=after - before, total=sum(tokens))


def require_step(plan: StepPlan, record: StepRecord) -> None:
    """Refuse to go on from a step in which a layer ran on other tokens than the plan leaves it.

    Raises: PlanNotApplied.
    """
    tokens = plan.rows.sum(0)
    # a piece of a prompt may leave later layers nothing to do
    require_applied((tokens > 0).astype(int).tolist(), [len(calls) for calls in record.calls], "attention ran {} times")
    calls = [calls[0] if calls else NO_CALL for calls in record.calls]
    held = np.where(plan.rows > 0, plan.after, 0)
    # more rows than tokens may fill a batch up, where layers run on every token
    rows, slots = (
        np.where(tokens < plan.total, counts, np.minimum(counts, tokens)).tolist()
        for counts in ([call.rows for call in calls], record.slots)
    )
    for planned, found, what in (
        (tokens, [call.tokens for call in calls], "attention was told of {} tokens"),
        (tokens, rows, "attention was given {} tokens"),
        (tokens, slots, "cache was given {} tokens"),
        (plan.rows.max(0), [call.longest_query for call in calls], "attention was given {} tokens of one prompt"),
        (held.max(0), [call.longest for call in calls], "cache holds {} tokens of one request"),
    ):
        require_applied(planned.tolist(), found, what)
    for layer, call in enumerate(calls):
        expected = sorted(held[:, layer][plan.rows[:, layer] > 0].tolist())
        if call.lengths is not None and sorted(call.lengths) != expected:
            raise not_applied(
                f"layer {layer}'s cache holds {call.lengths} tokens of requests, and by the plan {expected}"
            )
