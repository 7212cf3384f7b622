"""What was measured under load: runs, rows over rounds, and how eyes read them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastav.bench.load.clients import Seen
from fastav.bench.load.contenders import OFF
from fastav.bench.measure import Spread
from fastav.bench.report import load_json

FORMAT = 1  # of the JSON

Json = Mapping[str, Any]
RATES = ("requests_per_second", "output_tokens_per_second", "cpu_per_request")
TIMES = ("first", "gap")
PEAKS = ("running", "waiting", "cache", "preemptions")


def run(name: str, number: int, clients: int, seen: Seen) -> dict[str, Any]:
    """One level of one round, as JSON holds it.  first, gap: seconds to the first token, and from token to token."""
    whole = [said for said in seen.said if not said.error]
    tokens = sum(len(said.tokens) for said in whole)
    return {
        "contender": name,
        "round": number,
        "clients": clients,
        "asked": len(seen.said),
        "answered": len(whole),
        "seconds": seen.seconds,
        "cpu": seen.cpu,
        "prompt_tokens": sum(said.prompt for said in whole),
        "output_tokens": tokens,
        "requests_per_second": len(whole) / seen.seconds,
        "output_tokens_per_second": tokens / seen.seconds,
        "cpu_per_request": seen.cpu / len(whole) if whole else None,
        "first": _quantiles([said.first for said in whole]),
        "gap": _quantiles([gap for said in whole for gap in said.gaps]),
        "running": max(look.running for look in seen.looks),
        "waiting": max(look.waiting for look in seen.looks),
        "cache": max(look.cache for look in seen.looks),
        "preemptions": seen.after.preemptions - seen.looks[0].preemptions,
    }


def _quantiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    median, p95 = np.quantile(seconds, [0.5, 0.95]).tolist()
    return {"median": median, "p95": p95}


def rows(runs: Sequence[Json]) -> list[dict[str, Any]]:
    """What every contender does at every level: medians over rounds, ratios within a round to vLLM as it is.

    Peaks are those of the round that had most.
    """
    cells = dict.fromkeys((run["contender"], run["clients"]) for run in runs)
    order = list(dict.fromkeys(name for name, _ in cells))
    return [_row(runs, name, clients) for name, clients in sorted(cells, key=lambda c: (c[1], order.index(c[0])))]


def _row(runs: Sequence[Json], name: str, clients: int) -> dict[str, Any]:
    mine = {run["round"]: run for run in runs if (run["contender"], run["clients"]) == (name, clients)}
    base = {run["round"]: run for run in runs if (run["contender"], run["clients"]) == (OFF, clients)}
    row: dict[str, Any] = {"contender": name, "clients": clients, "rounds": len(mine)}
    row |= {key: sum(run[key] for run in mine.values()) for key in ("asked", "answered")}
    for key in RATES:
        row[key] = _spread([run[key] for run in mine.values()])
        row[f"{key}_ratio"] = _ratio(mine, base, key)
    for key in TIMES:
        there = [run[key] for run in mine.values() if run[key]]
        row[key] = (
            {what: float(np.median([one[what] for one in there])) for what in ("median", "p95")} if there else None
        )
    return row | {key: max(run[key] for run in mine.values()) for key in PEAKS}


def _ratio(mine: Mapping[int, Json], base: Mapping[int, Json], key: str) -> dict[str, float] | None:
    """Of rounds in which both are known."""
    both = [number for number in mine if number in base and mine[number][key] and base[number][key]]
    if not both:
        return None
    return asdict(Spread.of_ratios([mine[number][key] for number in both], [base[number][key] for number in both]))


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return asdict(Spread.of(known)) if known else None


def read(path: Path) -> dict[str, Any] | None:
    """What this benchmark wrote; None if the file holds something else.  Raises: FastAVError."""
    report = load_json(path)
    return report if isinstance(report, dict) and report.get("fastav_load") == FORMAT else None


def line(run: Json) -> str:
    """A run, for eyes."""
    first, gap = ("-" if run[key] is None else f"{1000 * run[key]['median']:.0f} ms" for key in TIMES)
    return (
        f"  {run['clients']:>2} clients: {run['answered']} of {run['asked']} answered in {run['seconds']:.1f} s "
        f"({run['cpu']:.1f} s of CPU), {run['requests_per_second']:.2f} a second, first token {first}, then {gap}, "
        f"cache {100 * run['cache']:.0f} %, preemptions {run['preemptions']}"
    )


def table(report: Json) -> str:
    """All rows, for eyes: medians over rounds."""
    lines = [
        _line("clients", "", "a second", "of off", "first, ms", "then, ms", "CPU s each", "of off", "cache", "waiting")
    ]
    for row in report["rows"]:
        lines.append(
            _line(
                f"{row['clients']}",
                row["contender"],
                _median(row["requests_per_second"]),
                _median(row["requests_per_second_ratio"]),
                "-" if row["first"] is None else f"{1000 * row['first']['median']:.0f}",
                "-" if row["gap"] is None else f"{1000 * row['gap']['median']:.0f}",
                _median(row["cpu_per_request"]),
                _median(row["cpu_per_request_ratio"]),
                f"{100 * row['cache']:.0f} %",
                f"{row['waiting']}",
            )
        )
    return "\n".join([*lines, *(f"wrong: {what}" for what in report["wrong"])])


def _line(clients: str, name: str, *cells: str) -> str:
    return f"{clients:>7} {name:<14.14}" + "".join(f"{cell:>11}" for cell in cells)


def _median(of: Json | None) -> str:
    return "-" if of is None else f"{of['median']:.2f}"
