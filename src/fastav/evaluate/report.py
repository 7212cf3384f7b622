"""The report of an evaluation: statistics of its rows by plan and family, ready for JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fastav import statistics
from fastav.agreement import rouge_l
from fastav.errors import FastAVError
from fastav.evaluate.rows import Results, Row

Metrics = Mapping[str, Mapping[str, Mapping[str, float | int]]]  # by plan, then family (or `all`), then name


def report(results: Results, metrics: Metrics | None = None) -> dict[str, Any]:
    """The report of an evaluation: its setting, and the statistics of every plan for all samples and for each family.

    metrics: further metrics, which the task defines. The reference for differences is the plan that prunes nothing.
    """
    first = results.runs[0]
    plans: Mapping[str, Mapping[str, Any]] = first["plans"]
    reference = next((name for name, plan in plans.items() if not plan["steps"]), None)
    rows = {name: [row for row in results.rows if row.plan == name] for name in plans}
    families_present = {row.family for row in results.rows}
    families = [
        name for name in dict.fromkeys(f for run in results.runs for f in run["families"]) if name in families_present
    ]

    def groups(name: str) -> dict[str, Any]:
        return {
            family or "all": _group(
                _family_rows(rows[name], family),
                _family_rows(rows[reference], family) if reference not in (None, name) else None,
                (metrics or {}).get(name, {}).get(family or "all", {}),
            )
            for family in (None, *families)
        }

    groups_by_plan = {name: groups(name) for name in plans}
    return {
        **{key: first[key] for key in ("task", "model", "device", "dtype")},
        "samples": len({row.sample for row in results.rows}),
        "reference": reference,
        "runs": [{key: value for key, value in run.items() if key != "plans"} for run in results.runs],
        "plans": {
            name: {"fingerprint": plans[name]["fingerprint"], "all": all_, "families": by_family}
            for name, by_family in groups_by_plan.items()
            for all_ in [by_family.pop("all")]
        },
    }


def merge(files: Iterable[Results]) -> list[Results]:
    """Merge files of the same task, model, device and dtype. For the same sample and plan, the later row counts.

    Raises: FastAVError if two plans of the same name differ.
    """
    groups: dict[tuple[Any, ...], list[Results]] = {}
    for results in files:
        groups.setdefault(tuple(results.runs[0][key] for key in ("task", "model", "device", "dtype")), []).append(
            results
        )
    return [_merge_group(group) for group in groups.values()]


def _merge_group(group: Sequence[Results]) -> Results:
    plans: dict[str, Any] = {}
    for results in group:
        for name, plan in results.runs[0]["plans"].items():
            if plans.setdefault(name, plan)["fingerprint"] != plan["fingerprint"]:
                raise FastAVError(
                    f"two different plans have the name {name!r}",
                    "use separate reports, or evaluate one under another name",
                )
    rows = {row.key: row for results in group for row in results.rows}
    runs = tuple({**run, "plans": plans} for results in group for run in results.runs)
    return Results(runs=runs, rows=tuple(rows.values()))


def _family_rows(rows: Sequence[Row], family: str | None) -> list[Row]:
    return [row for row in rows if family in (None, row.family)]


def _group(rows: Sequence[Row], reference: Sequence[Row] | None, metrics: Mapping[str, float | int]) -> dict[str, Any]:
    answered = [row for row in rows if row.error is None]
    scores = [row.score for row in answered]
    group: dict[str, Any] = {
        "n": len(answered),
        "errors": len(rows) - len(answered),
        "unparsed": sum(not row.parsed for row in answered),
        "score": statistics.mean(scores) if answered else None,
        "stderr": statistics.standard_error(scores) if answered else None,
        "interval": list(statistics.interval(scores)) if answered else None,
        "mean_retention": _mean_retention(answered),
        "flops_ratio": _mean_ratio([row.flops for row in answered]),
        "kv_ratio": _mean_ratio([row.kv_bytes for row in answered]),
        "seconds": {
            phase: float(np.median([row.seconds[phase] for row in answered]))
            for phase in (answered[0].seconds if answered else ())
        },
        "new_tokens": float(np.mean([row.new_tokens for row in answered])) if answered else None,
        "metrics": dict(metrics),
        "against_reference": None,
        "agreement": None,
    }
    if reference is not None:
        group["agreement"] = _agreement(answered, {row.sample: row.answer for row in reference if row.error is None})
        others = {row.sample: row.score for row in reference if row.error is None}
        if both := [row for row in answered if row.sample in others]:
            paired = statistics.difference([row.score for row in both], [others[row.sample] for row in both])
            group["against_reference"] = asdict(paired)
    return group


def _agreement(rows: Sequence[Row], unpruned: Mapping[str, str]) -> dict[str, Any] | None:
    """The agreement with the unpruned answers by sample; None if no sample has both."""
    both = [row for row in rows if row.sample in unpruned]
    if not both:
        return None
    return {
        "n": len(both),
        "exact": statistics.share([float(row.answer == unpruned[row.sample]) for row in both]),
        "rouge_l": statistics.share([rouge_l(row.answer, unpruned[row.sample]) for row in both]),
        "kl": statistics.divergence([row.kl for row in both if row.kl is not None]),
    }


def _mean_retention(rows: Sequence[Row]) -> float | None:
    """The mean over the rows that have media; None if it is unknown for one of them."""
    known = [row.retention for row in rows if set(row.prompt_tokens) - {"text"}]
    values = [value for value in known if value is not None]
    return statistics.mean(values) if values and len(values) == len(known) else None


def _mean_ratio(savings: Sequence[Mapping[str, int]]) -> float | None:
    return float(np.mean([saving["pruned"] / saving["full"] for saving in savings])) if savings else None
