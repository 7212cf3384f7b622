"""Prefill time against tokens, unpruned and pruned, with the least time of the FLOPs: `python -m fastav.bench.plot`.

One panel for every batch size. matplotlib is imported inside (the extra `report`).
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastav.bench.contenders import BASELINE
from fastav.bench.report import machine, read
from fastav.errors import FastAVError
from fastav.files import atomic_write
from fastav.installation import require_packages

Json = Mapping[str, Any]
INK, SOFT, GRID = "#1f2328", "#59636e", "#e4e8ec"
COLOURS = {BASELINE: "#bc4c00", "fastav": "#0969da"}
OTHERS = ("#1f9d6b", "#8250df", "#6e7781", "#bf8700")
LABELS = {BASELINE: "unpruned"}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One contender at one batch size, by length of the prompt: milliseconds, and the least time of the FLOPs."""

    name: str
    tokens: tuple[int, ...]
    median: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    limit: tuple[float, ...]


def require_matplotlib() -> None:
    """Raises: InstallationError if matplotlib is not installed."""
    require_packages("drawing", ("matplotlib",), "report")


def curves(reports: Iterable[Json]) -> dict[int, list[Curve]]:
    """By batch size, the curves of transformers and of every plan.  Raises: FastAVError if nothing was measured."""
    points: dict[tuple[int, str], dict[int, Json]] = {}
    for report in reports:
        for part in report["parts"]:
            for row in part["rows"]:
                if row["contender"] == BASELINE or row["plan"] != "none":
                    points.setdefault((part["batch"], row["contender"]), {})[part["tokens"]] = row
    if not points:
        raise FastAVError("there is nothing to draw", "name files that fastav bench --out wrote")
    panels: dict[int, list[Curve]] = {}
    for (batch, name), rows in sorted(points.items(), key=lambda item: item[0][0]):
        tokens = sorted(rows)
        values = {key: tuple(1000 * rows[n]["prefill"][key] for n in tokens) for key in ("median", "low", "high")}
        limit = tuple(1000 * rows[n]["prefill_limit"] for n in tokens)
        panels.setdefault(batch, []).append(Curve(name=name, tokens=tuple(tokens), limit=limit, **values))
    return panels


def draw(reports: Sequence[Json], path: Path) -> None:
    """Write the picture, whole or not at all.  Raises: FastAVError without matplotlib, or with nothing to draw."""
    require_matplotlib()
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = curves(reports)
    with style.context(STYLE):
        figure = Figure(figsize=(1.2 + 5.2 * len(panels), 4.6), dpi=160, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for number, (one, (batch, lines)) in enumerate(zip(axes, panels.items(), strict=True)):
            _panel(one, lines, f"batch {batch}", first=number == 0)
        figure.suptitle(_title(reports), x=0.012, ha="left", fontsize=12, fontweight="bold")
        figure.supxlabel(_footer(reports), x=0.012, ha="left", fontsize=8, color=SOFT)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            figure.savefig(part, format="png")


def _panel(axes: Any, lines: Sequence[Curve], title: str, *, first: bool) -> None:
    """Draw times as lines with points, quartiles as bands; dashed, the least time of the FLOPs at the measured rate."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    lengths = sorted({n for curve in lines for n in curve.tokens})
    axes.set_xscale("log")
    axes.set_yscale("log")
    others = iter(OTHERS * len(lines))
    for curve in lines:
        colour = COLOURS.get(curve.name) or next(others)
        axes.fill_between(curve.tokens, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            curve.tokens, curve.median, "o-", color=colour, linewidth=1.8, markersize=4.5, label=_label(curve, lines)
        )
        if curve.name in COLOURS:
            axes.plot(curve.tokens, curve.limit, "--", color=colour, linewidth=1.1, alpha=0.8)
    axes.plot([], [], "--", color=SOFT, linewidth=1.1, label="least time of the FLOPs")
    axes.set_title(title)
    axes.set_xlabel("tokens of the prompt")
    axes.xaxis.set_major_locator(FixedLocator(_apart(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.margins(x=0.06)
    axes.grid(True)
    axes.legend(loc="upper left", fontsize=9)
    if first:
        axes.set_ylabel("prefill, ms")


def _label(curve: Curve, lines: Sequence[Curve]) -> str:
    """The contender, and its time over the unpruned one's at the longest prompt that both have."""
    name = LABELS.get(curve.name, curve.name)
    base = next((one for one in lines if one.name == BASELINE), None)
    if base is None or base is curve or not (both := set(curve.tokens) & set(base.tokens)):
        return name
    longest = max(both)
    times = (one.median[one.tokens.index(longest)] for one in (curve, base))
    pruned, whole_prompt = times
    return f"{name}: {pruned / whole_prompt:.2f} of it at {longest:,}"


def _apart(lengths: Sequence[int]) -> list[int]:
    """The lengths whose labels do not touch, from the longest on."""
    shown: list[int] = []
    for n in reversed(lengths):
        if not shown or n <= shown[-1] / 1.35:
            shown.append(n)
    return shown


def _title(reports: Sequence[Json]) -> str:
    return f"Prefill of {', '.join(dict.fromkeys(report['model'] for report in reports))}"


def _footer(reports: Sequence[Json]) -> str:
    report = reports[0]
    versions = report["versions"]
    parts = [
        machine(report),
        report["dtype"],
        f"torch {versions['torch']}, transformers {versions['transformers']}",
        f"commit {report['commit'] or 'unknown'}",
        "random weights; bands are quartiles",
    ]
    return " · ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the reports in files; files that hold no report are skipped."""
    parser = argparse.ArgumentParser(prog="python -m fastav.bench.plot", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="reports of fastav bench")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    options = parser.parse_args(arguments)
    try:
        draw([report for file in options.files if (report := read(file)) is not None], options.out)
    except FastAVError as error:
        print(f"fastav.bench.plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
