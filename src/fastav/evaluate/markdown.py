"""A report as Markdown, for READMEs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastav.evaluate import wording


def markdown(report: Mapping[str, Any]) -> str:
    """Title, the table of plans, that of families if there are several, and the circumstances."""
    plans = report["plans"]
    extra = wording.metrics(report)
    heads = [
        "plan",
        "n",
        "score",
        *extra,
        "against unpruned",
        "p",
        "unparsed",
        "FLOPs",
        "KV cache",
        "prefill",
        "decode",
    ]
    rows = [[name, *_cells(plan["all"], extra)] for name, plan in plans.items()]
    parts = [f"**{_plain(wording.asked(report))}**", table(heads, rows)]
    families = list(dict.fromkeys(family for plan in plans.values() for family in plan["families"]))
    if len(families) > 1:
        parts.append(
            table(
                ["family", *plans],
                [
                    [family, *(wording.score(plan["families"][family]) for plan in plans.values())]
                    for family in families
                ],
            )
        )
    note = (
        "Score: points of 100 with Wilson's 95 % interval. Against unpruned: points on the same samples with their "
        "95 % interval (Bonett and Price); p: exact McNemar."
    )
    parts.append(f"{note} {_plain(wording.circumstances(report))}.")
    parts += [f"{_plain(line)}." for line in wording.lacking(report)]
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column left, the others right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(map(_plain, row))} |" for row in (heads, rule, *rows))


def _cells(group: Mapping[str, Any], extra: Sequence[str]) -> list[str]:
    return [
        str(group["n"]),
        wording.score(group),
        *(wording.metric(group["metrics"].get(name)) for name in extra),
        wording.difference(group),
        wording.p(group),
        str(group["unparsed"]),
        wording.percent(group["flops_ratio"]),
        wording.percent(group["kv_ratio"]),
        wording.seconds(group, "prefill"),
        wording.seconds(group, "decode"),
    ]


def _plain(text: str) -> str:
    """The text on one line: a bar would end its cell, and names must not become markup."""
    return "".join("\\" + c if c in "|*_`\\" else c for c in " ".join(text.split()))
