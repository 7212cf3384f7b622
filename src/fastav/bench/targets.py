"""What is aimed at, as data, and whether a row reaches it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Json = Mapping[str, Any]


class Verdict(StrEnum):
    """Of one target and one row."""

    MET = "met"
    MISSED = "missed"
    UNKNOWN = "not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that must not be more than `at_most`.

    value: of a row; None if the row does not hold it. about: whether it is aimed at for this row of this part, on
    whatever machine. machine: where it counts.
    """

    name: str
    at_most: float
    value: Callable[[Json], float | None]
    about: Callable[[Json, Json], bool]
    machine: Callable[[Json], bool]
    where: str

    def verdict(self, report: Json, row: Json) -> Verdict:
        """Of a row of a report."""
        value = self.value(row)
        if value is None or not self.machine(report):
            return Verdict.UNKNOWN
        return Verdict.MET if value <= self.at_most else Verdict.MISSED


def judged(report: Json, part: Json, row: Json) -> list[dict[str, Any]]:
    """The targets that are about a row, each with the row's value and the verdict."""
    return [
        {
            "name": t.name,
            "at_most": t.at_most,
            "where": t.where,
            "value": t.value(row),
            "verdict": t.verdict(report, row),
        }
        for t in TARGETS
        if t.about(part, row)
    ]


def _median(*path: str) -> Callable[[Json], float | None]:
    """The value at this path of a row, None where nothing stands."""

    def value(row: Json) -> float | None:
        found: Any = row
        for key in path:
            found = None if found is None else found.get(key)
        return found

    return value


def _over_flops(row: Json) -> float | None:
    ratio = _median("prefill_ratio", "median")(row)
    return None if ratio is None else ratio / row["flops_ratio"]


def _end_to_end(row: Json) -> float | None:
    """Of the answers that the target speaks of, which have 32 tokens."""
    return _median("end_to_end_ratio", "median")(row) if row["new_tokens"] == 32 else None


def _h200(report: Json) -> bool:
    return "H200" in report["machine"].get("gpu", "") and report["dtype"] == "bfloat16"


def _one_thread(report: Json) -> bool:
    return report["device"] == "cpu" and report["machine"]["threads"] == 1


def _fastav(part: Json, row: Json) -> bool:
    return row["contender"] == "fastav"


def _prunes(part: Json, row: Json) -> bool:
    """Of prompts that are long enough for a pass to take longer than to launch."""
    return row["ours"] and row["flops_ratio"] < 1 and part["tokens"] >= 2000


def _videollama2(part: Json, row: Json) -> bool:
    return _fastav(part, row) and part["model"] == "videollama2" and part["prompt"] == "example"


H200, CPU = "an H200 in bfloat16", "a CPU with one thread"
TARGETS = (
    Target(
        name="prefill over unpruned, VideoLLaMA2's prompt",
        at_most=0.62,
        value=_median("prefill_ratio", "median"),
        about=_videollama2,
        machine=_h200,
        where=H200,
    ),
    Target(
        name="prefill over unpruned, 20,000 tokens or more",
        at_most=0.58,
        value=_median("prefill_ratio", "median"),
        about=lambda part, row: _fastav(part, row) and part["tokens"] >= 20_000,
        machine=_h200,
        where=H200,
    ),
    Target(
        name="a new token over what its bytes allow",
        at_most=1.35,
        value=_median("decode_over_limit"),
        about=lambda part, row: row["ours"],
        machine=_h200,
        where=H200,
    ),
    Target(
        name="end to end over transformers unpruned, 32 tokens",
        at_most=0.35,
        value=_end_to_end,
        about=_fastav,
        machine=_h200,
        where=H200,
    ),
    Target(
        name="peak memory above the weights over transformers",
        at_most=0.5,
        value=_median("peak_ratio"),
        about=_fastav,
        machine=_h200,
        where=H200,
    ),
    Target(
        name="cuts, of the prefill",
        at_most=0.02,
        value=_median("cut", "share"),
        about=_prunes,
        machine=lambda report: _h200(report) or _one_thread(report),
        where=f"{H200}, or {CPU}",
    ),
    Target(
        name="prefill ratio over the FLOPs ratio",
        at_most=1.05,
        value=_over_flops,
        about=_prunes,
        machine=_one_thread,
        where=CPU,
    ),
)


def counted(report: Json) -> Iterator[tuple[Json, Json, Json]]:
    """Every part, row and judged target of a report."""
    for part in report["parts"]:
        for row in part["rows"]:
            for target in row["targets"]:
                yield part, row, target
