"""The page of a verification: what plans lose on a file of questions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastav.errors import InstallationError, install_hint
from fastav.evaluate.formatting import duration, kl, nats, percent, points, provenance
from fastav.report import formatting
from fastav.verify.report import title
from fastav.verify.rows import Results, Row

try:
    from fastav.report import figures
    from fastav.report.rendering import Drawing, both_widths, render
except ImportError as error:
    raise InstallationError(f"a report needs {error.name}, which is not installed", install_hint("report")) from None

SHOWN = 200  # answers of each kind, at most
LEADS = 3  # plans that the first paragraphs are about, at most


def losses_page(results: Results, report: Mapping[str, Any]) -> str:
    """The report of a verification as HTML.

    report: as `fastav verify --json` prints it: of these results, with thresholds and choice.
    """
    rows = [row for row in results.rows if row.error is None]
    same = [entry for row in rows if (entry := _same(row, list(report["plans"])))]
    differences = [
        {**one, "clip": Path(one["clip"]).name, "kl": nats(one["kl"]["mean"])} for one in report["differences"]
    ]
    context = {
        "model": report["model"],
        "title": title(report),
        "sentences": _sentences(report),
        "verdicts": list(_verdicts(report)),
        "tables": [_qualities(report), _costs(report)],
        "figure": _figure(report),
        "differences": differences[:SHOWN],
        "more_differences": max(0, len(differences) - SHOWN),
        "same": same[:SHOWN],
        "more_same": max(0, len(same) - SHOWN),
        "failures": [{**one, "clip": Path(one["clip"]).name} for one in report["failures"]],
        "left_out": {**(report["choice"]["rejected"] if report["choice"] else {}), **report["skipped"]},
        "max_new_tokens": report["max_new_tokens"],
        "provenance": provenance(report),
    }
    return render("losses.html", context)


def _qualities(report: Mapping[str, Any]) -> list[list[str]]:
    """The table of what plans lose; its headings first."""
    headings = ["Plan", "n", "Same answer", "First token", "ROUGE-L", "KL", "Largest KL"]
    rows = [
        [
            name,
            f"{plan['n']:,}",
            *(points(plan[key]) for key in ("exact", "first_token", "rouge_l")),
            kl(plan["kl"]),
            nats(plan["kl"] and plan["kl"]["max"]),
        ]
        for name, plan in report["plans"].items()
    ]
    return [headings, *rows]


def _costs(report: Mapping[str, Any]) -> list[list[str]]:
    """The table of what plans and the unpruned model cost; its headings first."""
    plans: dict[str, Any] = {"unpruned": report["unpruned"], **report["plans"]}
    rows = [
        [
            name,
            *(percent(ratio) for ratio in (plan["kept"].get("media"), plan["flops_ratio"], plan["kv_ratio"])),
            *(duration(plan["seconds"][phase]) for phase in ("prefill", "whole")),
            "-" if plan["peak_bytes"] is None else f"{plan['peak_bytes'] / 2**30:.2f} GiB",
        ]
        for name, plan in plans.items()
    ]
    return [["Plan", "Kept", "FLOPs", "KV cache", "Prefill", "Whole", "Memory"], *rows]


def _sentences(report: Mapping[str, Any]) -> list[str]:
    """What the chosen plan loses; without a choice, what the first plans lose."""
    chosen = report["choice"] and report["choice"]["plan"]
    names = [chosen] if chosen else list(report["plans"])[:LEADS]
    return [_sentence(name, report["plans"][name]) for name in names]


def _sentence(name: str, plan: Mapping[str, Any]) -> str:
    if not plan["n"]:
        return f"{name}: no question has an answer."
    same = round(plan["n"] * plan["exact"]["mean"])
    return (
        f"With {name}, {same:,} of {formatting.plural(plan['n'], 'answer')} stay the same, and next-token "
        f"distributions diverge by {nats(plan['kl']['mean'])} nats per token, at {percent(plan['flops_ratio'])} of the "
        "prefill FLOPs."
    )


def _verdicts(report: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """Whether thresholds are met, as sentences; the choice, if one was asked for."""
    choice, limits = report["choice"], report["thresholds"]
    if choice is not None:
        chosen = choice["plan"]
        return [(chosen is not None, f"Chosen: {chosen}." if chosen else "No plan meets the thresholds.")]
    if all(limit is None for limit in limits.values()):
        return []
    return [(not plan["unmet"], f"{name} {_met(plan['unmet'])}.") for name, plan in report["plans"].items()]


def _met(unmet: Sequence[str]) -> str:
    return f"does not meet the thresholds: {'; '.join(unmet)}" if unmet else "meets the thresholds"


def _figure(report: Mapping[str, Any]) -> Drawing | None:
    plans = {name: plan for name, plan in report["plans"].items() if plan["n"]}
    if not plans:
        return None
    alt = "Divergence and prefill FLOPs of every plan. The table has the numbers."
    return both_widths(alt, figures.losses, plans, report["thresholds"]["max_kl"])


def _same(row: Row, plans: Sequence[str]) -> dict[str, Any] | None:
    """A question to which some plans give the unpruned answer, these plans with their divergence."""
    equal = [(name, nats(row.plans[name].kl["mean"])) for name in plans if row.plans[name].exact]
    if not equal or row.unpruned is None:
        return None
    return {
        "id": row.id,
        "clip": Path(row.clip).name,
        "question": row.question,
        "answer": row.unpruned.text,
        "plans": equal,
    }
