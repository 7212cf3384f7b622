"""The report of a verification: measures of every plan over questions, ready for JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastav import statistics
from fastav.formatting import plural
from fastav.verify.rows import Measured, Results, Row


def report(results: Results) -> dict[str, Any]:
    """The report: its setting, the measures of every plan, the answers that differ, and the questions that failed.

    The answers that differ come with the largest divergence first.
    """
    first = results.runs[0]
    plans: Mapping[str, Mapping[str, Any]] = first["plans"]
    rows = [row for row in results.rows if row.error is None]
    return {
        **{key: first[key] for key in ("model", "device", "dtype", "max_new_tokens")},
        "questions": first["n_questions"],
        "answered": len(rows),
        "runs": [{key: value for key, value in run.items() if key != "plans"} for run in results.runs],
        "unpruned": _costs([row.unpruned for row in rows if row.unpruned is not None]),
        "plans": {name: {"fingerprint": plan["fingerprint"], **_plan(rows, name)} for name, plan in plans.items()},
        "differences": differences(rows, list(plans)),
        "failures": [
            {"id": row.id, "clip": row.clip, "question": row.question, "plan": plan, "error": reason}
            for row in results.rows
            for plan, reason in row.failures
        ],
    }


def title(report: Mapping[str, Any]) -> str:
    """`tiny on 12 questions, cpu, float32`; how many are answered, if not all."""
    part = "" if report["answered"] == report["questions"] else f"{report['answered']:,} of "
    questions = plural(report["questions"], "question")
    return f"{report['model']} on {part}{questions}, {report['device']}, {report['dtype']}"


def differences(rows: Sequence[Row], plans: Sequence[str]) -> list[dict[str, Any]]:
    """The answers that differ from the unpruned ones, those with the largest mean divergence first."""
    found = [
        {
            "id": row.id,
            "clip": row.clip,
            "question": row.question,
            "plan": plan,
            "unpruned": row.unpruned.text,
            "pruned": compared.answer.text,
            "rouge_l": compared.rouge_l,
            "kl": dict(compared.kl),
        }
        for row in rows
        for plan in plans
        if (compared := row.plans[plan]).answer is not None and row.unpruned is not None and not compared.exact
    ]
    return sorted(found, key=lambda one: one["kl"]["mean"], reverse=True)


def _plan(rows: Sequence[Row], name: str) -> dict[str, Any]:
    all_pairs = [(row.unpruned, row.plans[name]) for row in rows]
    pairs = [
        (unpruned, compared, compared.answer)
        for unpruned, compared in all_pairs
        if unpruned is not None and compared.answer is not None
    ]
    compared, answers = [one for _, one, _ in pairs], [answer for *_, answer in pairs]
    return {
        "n": len(pairs),
        "errors": len(all_pairs) - len(pairs),
        "exact": statistics.share([float(one.exact) for one in compared]),
        "first_token": statistics.share([float(one.first_token) for one in compared]),
        "rouge_l": statistics.share([one.rouge_l for one in compared]),
        "kl": statistics.divergence([one.kl for one in compared]),
        **_costs(answers),
        "time_ratio": {
            "prefill": _median([a.seconds["prefill"] / u.seconds["prefill"] for u, _, a in pairs]),
            "whole": _median([a.whole / u.whole for u, _, a in pairs]),
        },
    }


def _costs(answers: Sequence[Measured]) -> dict[str, Any]:
    peaks = [answer.peak_bytes for answer in answers if answer.peak_bytes is not None]
    return {
        "kept": _mean_kept(answers),
        "flops_ratio": _mean_ratio([answer.flops for answer in answers]),
        "kv_ratio": _mean_ratio([answer.kv_bytes for answer in answers]),
        "seconds": {
            "prefill": _median([answer.seconds["prefill"] for answer in answers]),
            "whole": _median([answer.whole for answer in answers]),
        },
        "new_tokens": statistics.mean([answer.new_tokens for answer in answers]) if answers else None,
        "peak_bytes": max(peaks, default=None),
    }


def _mean_kept(answers: Sequence[Measured]) -> dict[str, float]:
    """The mean share of tokens kept over the answers to prompts with this medium, by medium."""
    names = dict.fromkeys(name for answer in answers for name in answer.kept)
    return {name: statistics.mean([a.kept[name] for a in answers if name in a.kept]) for name in names}


def _mean_ratio(savings: Sequence[Mapping[str, int]]) -> float | None:
    return statistics.mean([saving["pruned"] / saving["full"] for saving in savings]) if savings else None


def _median(values: Sequence[float | int]) -> float | None:
    return float(np.median(values)) if values else None
