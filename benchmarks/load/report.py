"""Results of the load test: runs, rows over rounds, and their tables for a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.load.clients import LevelResult
from benchmarks.load.contenders import OFF
from fastav.bench.measure import Quartiles
from fastav.bench.report import cell

Json = Mapping[str, Any]
RATES = ("requests_per_second", "output_tokens_per_second", "cpu_per_request")
TIMES = ("first", "gap")
PEAKS = ("running", "waiting", "cache", "preemptions")


def run(name: str, number: int, clients: int, result: LevelResult) -> dict[str, Any]:
    """One level of one round, as JSON holds it.  first, gap: seconds to the first token, and between later ones."""
    answers = [completion for completion in result.completions if not completion.error]
    tokens = sum(len(answer.tokens) for answer in answers)
    return {
        "contender": name,
        "round": number,
        "clients": clients,
        "asked": len(result.completions),
        "answered": len(answers),
        "seconds": result.seconds,
        "cpu": result.cpu,
        "prompt_tokens": sum(answer.prompt for answer in answers),
        "output_tokens": tokens,
        "requests_per_second": len(answers) / result.seconds,
        "output_tokens_per_second": tokens / result.seconds,
        "cpu_per_request": result.cpu / len(answers) if answers else None,
        "first": _median_and_p95([answer.first for answer in answers]),
        "gap": _median_and_p95([gap for answer in answers for gap in answer.gaps]),
        **{key: max(getattr(metrics, key) for metrics in result.metrics) for key in ("running", "waiting", "cache")},
        "preemptions": result.after.preemptions - result.metrics[0].preemptions,
    }


def _median_and_p95(seconds: Sequence[float]) -> dict[str, float] | None:
    return dict(zip(("median", "p95"), np.quantile(seconds, [0.5, 0.95]).tolist(), strict=True)) if seconds else None


def rows(runs: Sequence[Json]) -> list[dict[str, Any]]:
    """A row for every contender at every level: medians over rounds, and ratios to unpruned vLLM within a round.

    Peaks are the largest of all rounds.
    """
    cells = dict.fromkeys((run["contender"], run["clients"]) for run in runs)
    order = list(dict.fromkeys(name for name, _ in cells))
    return [_row(runs, name, clients) for name, clients in sorted(cells, key=lambda c: (c[1], order.index(c[0])))]


def _row(runs: Sequence[Json], name: str, clients: int) -> dict[str, Any]:
    own, base = (
        {run["round"]: run for run in runs if (run["contender"], run["clients"]) == (one, clients)}
        for one in (name, OFF)
    )
    row: dict[str, Any] = {"contender": name, "clients": clients, "rounds": len(own)}
    row |= {key: sum(run[key] for run in own.values()) for key in ("asked", "answered")}
    for key in RATES:
        both = [number for number in own if number in base and own[number][key] and base[number][key]]
        values = [run[key] for run in own.values() if run[key] is not None]
        ratios = [own[number][key] / base[number][key] for number in both]
        row[key], row[f"{key}_ratio"] = (asdict(Quartiles.of(of)) if of else None for of in (values, ratios))
    for key in TIMES:
        known = [run[key] for run in own.values() if run[key]]
        medians = {what: float(np.median([one[what] for one in known])) for what in ("median", "p95") if known}
        row[key] = medians or None
    return row | {key: max(run[key] for run in own.values()) for key in PEAKS}


def line(run: Json) -> str:
    """A run, for a terminal."""
    first, gap = ("-" if run[key] is None else f"{1000 * run[key]['median']:.0f} ms" for key in TIMES)
    return (
        f"  {run['clients']:>2} clients: {run['answered']} of {run['asked']} answered in {run['seconds']:.1f} s "
        f"({run['cpu']:.1f} s of CPU), {run['requests_per_second']:.2f} a second, first token {first}, then {gap}, "
        f"cache {100 * run['cache']:.0f} %, preemptions {run['preemptions']}"
    )


def table(report: Json) -> str:
    """All rows, for a terminal: medians over rounds."""
    head = ("clients", "", "a second", "of off", "first, ms", "then, ms", "CPU s each", "of off", "cache", "waiting")
    lines = [_line(*head)]
    for row in report["rows"]:
        rate, rate_ratio, cpu, cpu_ratio = (
            cell(row[key], ".2f", brief=True)
            for name in ("requests_per_second", "cpu_per_request")
            for key in (name, f"{name}_ratio")
        )
        first, gap = (cell(row[key], ".0f", scale=1000, brief=True) for key in TIMES)
        cache, waiting = f"{100 * row['cache']:.0f} %", f"{row['waiting']}"
        cells = (rate, rate_ratio, first, gap, cpu, cpu_ratio, cache, waiting)
        lines.append(_line(f"{row['clients']}", row["contender"], *cells))
    return "\n".join([*lines, *(f"wrong: {what}" for what in report["wrong"])])


def _line(clients: str, name: str, *cells: str) -> str:
    return f"{clients:>7} {name:<14.14}" + "".join(f"{text:>11}" for text in cells)
