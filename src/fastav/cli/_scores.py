"""The tables of an evaluation, from what its JSON holds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fastav.cli._text import number, printable, stdout

ABREAST = 4  # plans, or metrics, side by side: 80 columns hold no more
NOTE = (
    "score: points of 100, Wilson's 95 % interval; against unpruned: on the same samples, 95 % interval, exact McNemar "
    "p; FLOPs and KV cache: of the unpruned prefill; prefill and decode: median"
)


def show(report: Mapping[str, Any]) -> None:
    """The screen of `fastav eval`: quality, cost, the task's own metrics, families, circumstances."""
    screen(report, _tables(report), NOTE)


def screen(report: Mapping[str, Any], parts: Iterable[RenderableType], note: str) -> None:
    """What was asked, tables of what was found, what is missing, what the columns are, and circumstances."""
    from fastav.evaluate import wording

    console = stdout()
    console.print(Text(printable(wording.asked(report)), "bold"))
    for part in parts:
        console.print("", part, sep="\n")
    for line in wording.lacking(report):
        console.print(Text(f"\n{printable(line)}", "yellow"))
    console.print(Text(f"\n{note}\n{printable(wording.circumstances(report))}", "dim"))


def _tables(report: Mapping[str, Any]) -> Iterator[Table]:
    from fastav.evaluate import wording

    plans = {name: plan["all"] for name, plan in report["plans"].items()}
    yield table(
        ["plan", "n", "score", "against unpruned", "p"],
        [[name, number(p["n"]), wording.score(p), wording.difference(p), wording.p(p)] for name, p in plans.items()],
    )
    yield table(
        ["plan", "FLOPs", "KV cache", "prefill", "decode", "unparsed"],
        [
            [
                name,
                wording.percent(p["flops_ratio"]),
                wording.percent(p["kv_ratio"]),
                wording.seconds(p, "prefill"),
                wording.seconds(p, "decode"),
                number(p["unparsed"]),
            ]
            for name, p in plans.items()
        ],
    )
    for names in _abreast(wording.metrics(report)):
        rows = [[name, *(wording.metric(p["metrics"].get(metric)) for metric in names)] for name, p in plans.items()]
        yield table(["plan", *names], rows)
    families = list(dict.fromkeys(family for plan in report["plans"].values() for family in plan["families"]))
    if len(families) > 1:
        for names in _abreast(list(plans)):
            found = [report["plans"][name]["families"] for name in names]
            yield table(
                ["family", *names], [[family, *(wording.score(one[family]) for one in found)] for family in families]
            )


def _abreast(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[first : first + ABREAST] for first in range(0, len(names), ABREAST))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column left, the others right; what is too long for the screen goes on below."""
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for index, head in enumerate(heads):
        name = index == 0
        drawn.add_column(
            printable(head), justify="left" if name else "right", style="bold" if name else "", overflow="fold"
        )
    for row in rows:
        drawn.add_row(*map(printable, row))
    return drawn
