"""Targets of speed and memory, as data, and whether a row meets them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Json = Mapping[str, Any]


class Machine(NamedTuple):
    """A kind of machine.  matches: whether a report comes from one."""

    name: str
    matches: Callable[[Json], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A value that must not be above `at_most`.

    value: of a row; None if the row does not have it. applies: whether the target is about this row of this part.
    machine: where the target counts.
    """

    name: str
    at_most: float
    value: Callable[[Json], float | None]
    applies: Callable[[Json, Json], bool]
    machine: Machine

    def verdict(self, report: Json, row: Json) -> str:
        """`met`, `missed` or `not measured`."""
        value = self.value(row)
        if value is None or not self.machine.matches(report):
            return "not measured"
        return "met" if value <= self.at_most else "missed"


def verdicts(report: Json, part: Json, row: Json) -> list[dict[str, Any]]:
    """The targets about a row, each with the row's value and the verdict."""
    return [
        {
            "name": target.name,
            "at_most": target.at_most,
            "where": target.machine.name,
            "value": target.value(row),
            "verdict": target.verdict(report, row),
        }
        for target in TARGETS
        if target.applies(part, row)
    ]


def _at(*path: str) -> Callable[[Json], float | None]:
    """The value at this path of a row; None if any step of the path is missing."""

    def value(row: Json) -> float | None:
        item: Any = row
        for key in path:
            item = None if item is None else item.get(key)
        return item

    return value


_prefill_ratio = _at("prefill_ratio", "median")


def _over_flops(row: Json) -> float | None:
    ratio = _prefill_ratio(row)
    return None if ratio is None else ratio / row["flops_ratio"]


def _end_to_end(row: Json) -> float | None:
    """The ratio of answers of 32 tokens, which the target is about."""
    return _at("end_to_end_ratio", "median")(row) if row["new_tokens"] == 32 else None


def _fastav(part: Json, row: Json) -> bool:
    return row["contender"] == "fastav"


def _prunes(part: Json, row: Json) -> bool:
    """Whether a plan prunes a prompt that is long enough for a pass to take longer than its launch."""
    return row["ours"] and row["flops_ratio"] < 1 and part["tokens"] >= 2000


def _videollama2(part: Json, row: Json) -> bool:
    return _fastav(part, row) and part["model"] == "videollama2" and part["prompt"] == "example"


def _is_h200(report: Json) -> bool:
    return "H200" in report["machine"].get("gpu", "") and report["dtype"] == "bfloat16"


def _is_one_thread(report: Json) -> bool:
    return report["device"] == "cpu" and report["machine"]["threads"] == 1


H200 = Machine("an H200 in bfloat16", _is_h200)
CPU = Machine("a CPU with one thread", _is_one_thread)
EITHER = Machine(f"{H200.name}, or {CPU.name}", lambda report: _is_h200(report) or _is_one_thread(report))
TARGETS = (
    Target(
        name="prefill over unpruned, VideoLLaMA2's prompt",
        at_most=0.62,
        value=_prefill_ratio,
        applies=_videollama2,
        machine=H200,
    ),
    Target(
        name="prefill over unpruned, 20,000 tokens or more",
        at_most=0.58,
        value=_prefill_ratio,
        applies=lambda part, row: _fastav(part, row) and part["tokens"] >= 20_000,
        machine=H200,
    ),
    Target(
        name="a new token over what its bytes allow",
        at_most=1.35,
        value=_at("decode_over_limit"),
        applies=lambda part, row: row["ours"],
        machine=H200,
    ),
    Target(
        name="end to end over transformers unpruned, 32 tokens",
        at_most=0.35,
        value=_end_to_end,
        applies=_fastav,
        machine=H200,
    ),
    Target(
        name="peak memory above the weights over transformers",
        at_most=0.5,
        value=_at("peak_ratio"),
        applies=_fastav,
        machine=H200,
    ),
    Target(name="cuts, of the prefill", at_most=0.02, value=_at("cut", "share"), applies=_prunes, machine=EITHER),
    Target(name="prefill ratio over the FLOPs ratio", at_most=1.05, value=_over_flops, applies=_prunes, machine=CPU),
)
