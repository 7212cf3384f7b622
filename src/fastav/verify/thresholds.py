"""Thresholds for the loss that a plan may cause, and the choice of the cheapest plan that meets them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastav.errors import FastAVError
from fastav.formatting import plural

CRITERION = "the lowest prefill FLOPs of the plans whose 95 % intervals meet the thresholds on every question"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a plan must meet.

    max_kl: the largest mean divergence, in nats. min_agreement: the smallest share of answers that equal the unpruned
    ones, in [0, 1]. None: no threshold.
    Raises: FastAVError for values out of range.
    """

    max_kl: float | int | None = None
    min_agreement: float | int | None = None

    def __post_init__(self) -> None:
        if self.max_kl is not None and not 0 <= self.max_kl < float("inf"):
            raise FastAVError(f"max_kl must be 0 or more, got {self.max_kl}", "e.g. 0.05; it is in nats")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise FastAVError(f"min_agreement must be in [0, 1], got {self.min_agreement}", "e.g. 0.9")

    def __bool__(self) -> bool:
        return self.max_kl is not None or self.min_agreement is not None

    def unmet(self, plan: Mapping[str, Any], *, cautious: bool = False) -> list[str]:
        """Why a plan does not meet the thresholds, by its part of the report; empty if it does.

        cautious: judge by the unfavourable end of the 95 % interval, instead of by the estimate.
        """
        return list(self._unmet(plan, cautious))

    def _unmet(self, plan: Mapping[str, Any], cautious: bool) -> Iterator[str]:
        if not plan["n"]:
            yield "no question has an answer"
            return
        if plan["errors"]:
            yield f"{plural(plan['errors'], 'question')} failed"
        kl, exact = plan["kl"], plan["exact"]
        if self.max_kl is not None:
            value = kl["mean"] if not cautious else kl["interval"] and kl["interval"][1]
            if value is None:
                yield "the KL divergence of one question has no interval"
            elif value > self.max_kl:
                yield f"the KL divergence {_of(cautious, 'may be')} {value:.3g}, above {self.max_kl:g}"
        if self.min_agreement is not None:
            value = exact["interval"][0] if cautious else exact["mean"]
            if value < self.min_agreement:
                share = f"{100 * value:.1f} %, below {100 * self.min_agreement:g} %"
                yield f"the share of equal answers {_of(cautious, 'may be')} {share}"

    def choose(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """The cheapest plan that meets the thresholds with caution, and why each other plan was not chosen.

        The result has `criterion`, `plan` (None if no plan meets the thresholds), `met` (the plans that do) and
        `rejected` (reasons by plan).
        Raises: FastAVError without a threshold.
        """
        if not self:
            raise FastAVError("there is no threshold to choose by", "give --max-kl, --min-agreement or both")
        reasons = {name: self.unmet(plan, cautious=True) for name, plan in report["plans"].items()}
        meeting = [name for name, unmet in reasons.items() if not unmet]
        cheapest = min(
            meeting,
            key=lambda name: (report["plans"][name]["flops_ratio"], report["plans"][name]["kv_ratio"]),
            default=None,
        )
        rejected = {
            name: "; ".join(unmet) or f"it costs no less than {cheapest}"
            for name, unmet in reasons.items()
            if name != cheapest
        }
        return {"criterion": CRITERION, "plan": cheapest, "met": meeting, "rejected": rejected}


def _of(cautious: bool, words: str) -> str:
    return words if cautious else "is"
