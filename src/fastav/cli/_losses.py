"""The screen of a verification, drawn from the data that `--json` prints."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from fastav.cli._scores import table
from fastav.cli._text import number, printable, size, stdout, width
from fastav.formatting import plural

SHOWN = 10  # answers that differ, at most
NOTE = (
    "same answer, first token: of 100 questions, with Wilson's 95 % interval; ROUGE-L: against the unpruned answer; "
    "KL: nats per token along it, with a bootstrap interval over questions; retention: audio, video and image "
    "tokens, mean over layers; FLOPs, KV cache: of the unpruned prefill; prefill, whole: median; memory: peak"
)


def show(report: Mapping[str, Any]) -> None:
    """Print the measures of every plan, and the answers that differ."""
    from fastav.evaluate.formatting import provenance
    from fastav.verify.report import title

    console = stdout()
    console.print(Text(printable(title(report)), "bold"))
    for part in (*_tables(report), *_differences(report)):
        console.print("", part, sep="\n")
    console.print(Text(f"\n{NOTE}\n{printable(provenance(report))}", "dim"))


def _tables(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    from fastav.evaluate.formatting import duration, kl, nats, percent, points

    plans = report["plans"]
    yield table(
        ["plan", "n", "same answer", "ROUGE-L"],
        [[name, number(p["n"]), points(p["exact"]), points(p["rouge_l"])] for name, p in plans.items()],
    )
    yield table(
        ["plan", "KL", "largest KL", "same first token"],
        [[name, kl(p["kl"]), nats(p["kl"] and p["kl"]["max"]), points(p["first_token"])] for name, p in plans.items()],
    )
    costs = {"unpruned": report["unpruned"], **plans}
    yield table(
        ["plan", "retention", "FLOPs", "KV cache", "prefill", "whole", "memory"],
        [
            [
                name,
                *(percent(ratio) for ratio in (p["kept"].get("media"), p["flops_ratio"], p["kv_ratio"])),
                *(duration(p["seconds"][phase]) for phase in ("prefill", "whole")),
                size(p["peak_bytes"]),
            ]
            for name, p in costs.items()
        ],
    )


def _differences(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    from fastav.evaluate.formatting import nats

    found = report["differences"]
    if not found:
        return
    yield Text(f"{plural(len(found), 'answer')} {'differs' if len(found) == 1 else 'differ'}", "bold")
    for one in found[:SHOWN]:
        yield Text.assemble(
            (_line(f"{one['plan']}, KL {nats(one['kl']['mean'])}, question {one['id']}: ", one["question"]), "bold"),
            f"\n{_line('  unpruned: ', one['unpruned'])}\n{_line('  pruned:   ', one['pruned'])}",
        )
    if len(found) > SHOWN:
        yield Text(f"{number(len(found) - SHOWN)} more are in --json and --html", "dim")


def _line(prefix: str, text: str) -> str:
    """A text on one line of the screen."""
    line, room = prefix + printable(" ".join(text.split())), width()
    return line if len(line) <= room else f"{line[: room - 1]}\N{HORIZONTAL ELLIPSIS}"
