"""The tables of an evaluation, drawn from the data that `--json` prints."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fastav.cli._text import number, printable, stdout

MAX_COLUMNS = 4  # plans or metrics side by side that fit into 80 columns
NOTE = (
    "score: of 100 points, with Wilson's 95 % interval; against unpruned: difference on the same samples with its 95 % "
    "interval; p: exact McNemar test; FLOPs and KV cache: of the unpruned prefill; prefill and decode: median; same "
    "answer, ROUGE-L and KL (nats per token; measured with --kl): against the unpruned answers"
)


def show(report: Mapping[str, Any]) -> None:
    """Print the screen of `fastav eval`: quality, cost, the task's own metrics, families, and provenance."""
    screen(report, _tables(report), NOTE)


def screen(report: Mapping[str, Any], parts: Iterable[RenderableType], note: str) -> None:
    """Print a title, tables, missing answers, a note about the columns, and the provenance."""
    from fastav.evaluate import formatting

    console = stdout()
    console.print(Text(printable(formatting.title(report)), "bold"))
    for part in parts:
        console.print("", part, sep="\n")
    for line in formatting.missing_answers(report):
        console.print(Text(f"\n{printable(line)}", "yellow"))
    console.print(Text(f"\n{note}\n{printable(formatting.provenance(report))}", "dim"))


def _tables(report: Mapping[str, Any]) -> Iterator[Table]:
    from fastav.evaluate import formatting

    plans = {name: plan["all"] for name, plan in report["plans"].items()}
    yield table(
        ["plan", "n", "score", "against unpruned", "p"],
        [
            [name, number(p["n"]), formatting.score(p), formatting.difference(p), formatting.p(p)]
            for name, p in plans.items()
        ],
    )
    yield table(
        ["plan", "retention", "FLOPs", "KV cache", "prefill", "decode", "unparsed"],
        [
            [
                name,
                formatting.percent(p["mean_retention"]),
                formatting.percent(p["flops_ratio"]),
                formatting.percent(p["kv_ratio"]),
                formatting.seconds(p, "prefill"),
                formatting.seconds(p, "decode"),
                number(p["unparsed"]),
            ]
            for name, p in plans.items()
        ],
    )
    if agreement := formatting.agreement(report):
        yield table(formatting.AGREEMENT, agreement)
    for names in _chunks(formatting.metrics(report)):
        rows = [[name, *(formatting.metric(p["metrics"].get(metric)) for metric in names)] for name, p in plans.items()]
        yield table(["plan", *names], rows)
    families = list(dict.fromkeys(family for plan in report["plans"].values() for family in plan["families"]))
    if len(families) > 1:
        for names in _chunks(list(plans)):
            groups = [report["plans"][name]["families"] for name in names]
            yield table(
                ["family", *names],
                [[family, *(formatting.score(one[family]) for one in groups)] for family in families],
            )


def _chunks(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[first : first + MAX_COLUMNS] for first in range(0, len(names), MAX_COLUMNS))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table with its first column aligned left and the others right. Long texts wrap."""
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for index, heading in enumerate(headings):
        name = index == 0
        grid.add_column(
            printable(heading), justify="left" if name else "right", style="bold" if name else "", overflow="fold"
        )
    for row in rows:
        grid.add_row(*map(printable, row))
    return grid
