"""From rows to what is shown: by plan and family, with statistics, as JSON holds it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fastav.errors import FastAVError
from fastav.evaluate import statistics
from fastav.evaluate.rows import Row, Stored

Metrics = Mapping[str, Mapping[str, Mapping[str, float | int]]]  # by plan, then family (or `all`), then name


def report(stored: Stored, metrics: Metrics | None = None) -> dict[str, Any]:
    """What an evaluation found: what was evaluated where, and by plan the statistics of all samples and each family.

    metrics: further ones, which the task defines. A plan that prunes nothing is what the others are compared with.
    """
    first = stored.runs[0]
    plans: Mapping[str, Mapping[str, Any]] = first["plans"]
    reference = next((name for name, plan in plans.items() if not plan["steps"]), None)
    rows = {name: [row for row in stored.rows if row.plan == name] for name in plans}
    there = {row.family for row in stored.rows}
    families = [name for name in dict.fromkeys(f for run in stored.runs for f in run["families"]) if name in there]

    def groups(name: str) -> dict[str, Any]:
        return {
            family or "all": _group(
                _of(rows[name], family),
                _of(rows[reference], family) if reference not in (None, name) else None,
                (metrics or {}).get(name, {}).get(family or "all", {}),
            )
            for family in (None, *families)
        }

    found = {name: groups(name) for name in plans}
    return {
        **{key: first[key] for key in ("task", "model", "device", "dtype")},
        "samples": len({row.sample for row in stored.rows}),
        "reference": reference,
        "runs": [{key: value for key, value in run.items() if key != "plans"} for run in stored.runs],
        "plans": {
            name: {"fingerprint": plans[name]["fingerprint"], "all": all_, "families": by_family}
            for name, by_family in found.items()
            for all_ in [by_family.pop("all")]
        },
    }


def merged(files: Iterable[Stored]) -> list[Stored]:
    """Files of the same task, model, device and dtype as one; of the same sample and plan, the later row counts.

    Raises: FastAVError if two plans of the same name differ.
    """
    groups: dict[tuple[Any, ...], list[Stored]] = {}
    for stored in files:
        groups.setdefault(tuple(stored.runs[0][key] for key in ("task", "model", "device", "dtype")), []).append(stored)
    return [_merged(group) for group in groups.values()]


def _merged(group: Sequence[Stored]) -> Stored:
    plans: dict[str, Any] = {}
    for stored in group:
        for name, plan in stored.runs[0]["plans"].items():
            if plans.setdefault(name, plan)["fingerprint"] != plan["fingerprint"]:
                raise FastAVError(
                    f"two different plans are called {name!r}", "draw them apart, or evaluate one under another name"
                )
    rows = {row.pair: row for stored in group for row in stored.rows}
    runs = tuple({**run, "plans": plans} for stored in group for run in stored.runs)
    return Stored(runs=runs, rows=tuple(rows.values()))


def _of(rows: Sequence[Row], family: str | None) -> list[Row]:
    return [row for row in rows if family in (None, row.family)]


def _group(rows: Sequence[Row], reference: Sequence[Row] | None, metrics: Mapping[str, float | int]) -> dict[str, Any]:
    good = [row for row in rows if row.error is None]
    scores = [row.score for row in good]
    group: dict[str, Any] = {
        "n": len(good),
        "errors": len(rows) - len(good),
        "unparsed": sum(not row.parsed for row in good),
        "score": statistics.mean(scores) if good else None,
        "stderr": statistics.standard_error(scores) if good else None,
        "interval": list(statistics.interval(scores)) if good else None,
        "flops_ratio": _mean_ratio([row.flops for row in good]),
        "kv_ratio": _mean_ratio([row.kv_bytes for row in good]),
        "seconds": {
            phase: float(np.median([row.seconds[phase] for row in good])) for phase in (good[0].seconds if good else ())
        },
        "new_tokens": float(np.mean([row.new_tokens for row in good])) if good else None,
        "metrics": dict(metrics),
        "against_reference": None,
    }
    if reference is not None:
        others = {row.sample: row.score for row in reference if row.error is None}
        if both := [row for row in good if row.sample in others]:
            found = statistics.difference([row.score for row in both], [others[row.sample] for row in both])
            group["against_reference"] = asdict(found)
    return group


def _mean_ratio(savings: Sequence[Mapping[str, int]]) -> float | None:
    return float(np.mean([saving["pruned"] / saving["full"] for saving in savings])) if savings else None
