"""Verification of plans on your own questions, without labels: what changes against the unpruned model.

    verification = Verification.of("qwen2-5-omni", Path("questions.jsonl"), {"fastav": plan})
    with open_rows(Path("rows.jsonl"), verification.head()) as file:
        for row in verification.rows(file.rows):
            file.append(row)
    print(report(file.results)["plans"]["fastav"]["kl"])

docs/verify.md defines the file format and every measure.
"""

from typing import TYPE_CHECKING, Any

from fastav.verify.report import report
from fastav.verify.rows import Compared, Measured, Row, open_rows, read
from fastav.verify.thresholds import Thresholds

if TYPE_CHECKING:
    from fastav.verify.verification import Verification

__all__ = ["Compared", "Measured", "Row", "Thresholds", "Verification", "open_rows", "read", "report"]


def __getattr__(name: str) -> Any:
    if name != "Verification":
        raise AttributeError(f"module 'fastav.verify' has no attribute {name!r}")
    from fastav.verify.verification import Verification  # it needs torch, which reading rows does not

    return Verification
