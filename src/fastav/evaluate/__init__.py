"""Evaluation of a task under several plans: rows in a file, their statistics, tables and a chart.

    evaluation = Evaluation.of("videollama2", task, {"none": none, "fastav": plan})
    with open_rows(Path("rows.jsonl"), evaluation.head()) as file:
        for row in evaluation.rows(file.rows):
            file.append(row)
    print(markdown(report(file.results)))

docs/eval.md defines the file format and every statistic.
"""

from typing import TYPE_CHECKING, Any

from fastav.evaluate.chart import chart
from fastav.evaluate.markdown import markdown
from fastav.evaluate.report import merge, report
from fastav.evaluate.rows import Results, Row, open_rows, read

if TYPE_CHECKING:
    from fastav.evaluate.evaluation import Evaluation

__all__ = ["Evaluation", "Results", "Row", "chart", "markdown", "merge", "open_rows", "read", "report"]


def __getattr__(name: str) -> Any:
    if name != "Evaluation":
        raise AttributeError(f"module 'fastav.evaluate' has no attribute {name!r}")
    from fastav.evaluate.evaluation import Evaluation  # it needs torch, which reading rows does not

    return Evaluation
