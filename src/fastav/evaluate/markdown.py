"""A report as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastav.evaluate import formatting


def markdown(report: Mapping[str, Any]) -> str:
    """Title, table of plans, table of families if there are several, and provenance."""
    plans = report["plans"]
    task_metrics = formatting.metrics(report)
    headings = [
        "plan",
        "n",
        "score",
        *task_metrics,
        "against unpruned",
        "p",
        "unparsed",
        "retention",
        "FLOPs",
        "KV cache",
        "prefill",
        "decode",
    ]
    rows = [[name, *_cells(plan["all"], task_metrics)] for name, plan in plans.items()]
    parts = [f"**{_escape(formatting.title(report))}**", table(headings, rows)]
    if agreement := formatting.agreement(report):
        parts.append(table(formatting.AGREEMENT, agreement))
    families = list(dict.fromkeys(family for plan in plans.values() for family in plan["families"]))
    if len(families) > 1:
        parts.append(
            table(
                ["family", *plans],
                [
                    [family, *(formatting.score(plan["families"][family]) for plan in plans.values())]
                    for family in families
                ],
            )
        )
    note = (
        "Score: of 100 points, with Wilson's 95 % interval. Against unpruned: difference in points on the same samples "
        "with its 95 % interval (Bonett and Price); p: exact McNemar test. Same answer, ROUGE-L and KL (nats per "
        "token, bootstrap interval): against the unpruned answers. Retention: audio, video and image tokens that "
        "layers run on, mean over layers."
    )
    parts.append(f"{note} {_escape(formatting.provenance(report))}.")
    parts += [f"{_escape(line)}." for line in formatting.missing_answers(report)]
    return "\n\n".join(parts) + "\n"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with its first column aligned left and the others right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(map(_escape, row))} |" for row in (headings, rule, *rows))


def _cells(group: Mapping[str, Any], task_metrics: Sequence[str]) -> list[str]:
    return [
        str(group["n"]),
        formatting.score(group),
        *(formatting.metric(group["metrics"].get(name)) for name in task_metrics),
        formatting.difference(group),
        formatting.p(group),
        str(group["unparsed"]),
        formatting.percent(group["mean_retention"]),
        formatting.percent(group["flops_ratio"]),
        formatting.percent(group["kv_ratio"]),
        formatting.seconds(group, "prefill"),
        formatting.seconds(group, "decode"),
    ]


def _escape(text: str) -> str:
    """The text on one line, with Markdown characters escaped."""
    return "".join("\\" + c if c in "|*_`\\" else c for c in " ".join(text.split()))
