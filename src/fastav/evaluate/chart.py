"""A chart of score against FLOPs: one panel per model and task, one point per plan.

matplotlib is imported inside, because reports do not need it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from math import hypot
from typing import Any

from fastav.errors import FastAVError
from fastav.evaluate import formatting
from fastav.evaluate.labels import Box, Number, place_labels

KINDS = ("svg", "png", "pdf")
WIDTH, HEIGHT, DPI = 9.4, 5.0, 100  # size of a panel in inches, and pixels per inch for placing labels
RADIUS = 5.5  # radius of a point, in pixels
PAPER, INK, SOFT, GRID = "#ffffff", "#1f2328", "#59636e", "#e4e8ec"
FRONT, OTHER, UNPRUNED = "#0969da", "#8c959f", "#bc4c00"
DARK = {  # replacements of the colours in a dark theme
    PAPER: "#0d1117",
    INK: "#e6edf3",
    SOFT: "#9198a1",
    GRID: "#262c36",
    FRONT: "#58a6ff",
    OTHER: "#7d8590",
    UNPRUNED: "#f0883e",
}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastav",
}
METADATA = {"svg": {"Date": None}, "png": {"Software": None}, "pdf": {"CreationDate": None}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A plan: its FLOPs in percent of the unpruned model's, its score and the score's 95 % interval, both of 100
    points.
    """

    name: str
    flops: Number
    score: Number
    low: Number
    high: Number


def chart(reports: Sequence[Mapping[str, Any]], kind: str = "svg") -> bytes:
    """The panels, one below the other, as a file of this kind: svg, png or pdf.

    An SVG follows the reader's light or dark theme.
    Raises: FastAVError for another kind, or without matplotlib.
    """
    if kind not in KINDS:
        what = f"a .{kind} file" if kind else "a file without a suffix"
        raise FastAVError(f"a chart cannot be written as {what}", "name a file that ends in .svg, .png or .pdf")
    if find_spec("matplotlib") is None:
        raise FastAVError("a chart needs matplotlib, which is not installed", "pip install matplotlib")
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(reports)), dpi=DPI)
        FigureCanvasAgg(figure)  # it measures texts, for any kind of file
        panels = figure.subplots(len(reports), squeeze=False)[:, 0]
        top, bottom = 0.66 / HEIGHT, 0.72 / HEIGHT
        figure.subplots_adjust(
            left=0.07,
            right=0.97,
            top=1 - top / len(reports),
            bottom=bottom / len(reports),
            hspace=(top + bottom) / (1 - top - bottom),
        )
        for panel, report in zip(panels, reports, strict=True):
            _draw(panel, report)
        file = BytesIO()
        figure.savefig(file, format=kind, dpi=DPI * (2 if kind == "png" else 1), metadata=METADATA[kind])
    return _with_dark_colours(file.getvalue()) if kind == "svg" else file.getvalue()


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, by FLOPs: the points that no other point beats with as few FLOPs."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.flops, -point.score)):
        if not best or point.score > best[-1].score:
            best.append(point)
    return best


def _points(report: Mapping[str, Any]) -> list[Point]:
    return [
        Point(
            name=name,
            flops=100 * total["flops_ratio"],
            score=100 * total["score"],
            low=100 * total["interval"][0],
            high=100 * total["interval"][1],
        )
        for name, plan in report["plans"].items()
        if (total := plan["all"])["score"] is not None
    ]


def _draw(axes: Any, report: Mapping[str, Any]) -> None:
    title = f"{report['model']} on {report['task']}"
    axes.annotate(title, (0, 1), (-34, 28), "axes fraction", "offset points", fontsize=11.5, fontweight="bold")
    axes.annotate(_subtitle(report), (0, 1), (-34, 13), "axes fraction", "offset points", fontsize=8.5, color=SOFT)
    provenance = _truncate(formatting.provenance(report))
    axes.annotate(provenance, (0, 0), (-34, -42), "axes fraction", "offset points", fontsize=7, color=SOFT)
    axes.set_xlabel("prefill FLOPs, share of the unpruned model's", loc="right", fontsize=8.5)
    points = _points(report)
    if not points:
        axes.text(0.5, 0.5, "no answers yet", transform=axes.transAxes, ha="center", color=SOFT)
        return
    low, high = min(point.low for point in points), max(point.high for point in points)
    padding = max(1.0, 0.15 * (high - low))
    axes.set_xlim(0, 1.04 * max(100, *(point.flops for point in points)))
    axes.set_ylim(max(-1.0, low - padding), min(101.0, high + padding))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    best, unpruned = front(points), next((p for p in points if p.name == report["reference"]), None)
    if unpruned is not None:
        axes.axhspan(unpruned.low, unpruned.high, color=UNPRUNED, alpha=0.08, linewidth=0)
        axes.axhline(unpruned.score, color=UNPRUNED, linestyle=(0, (6, 4)), linewidth=1)
    axes.plot([p.flops for p in best], [p.score for p in best], color=FRONT, alpha=0.55, linewidth=2)
    for point in points:
        colour = UNPRUNED if point is unpruned else FRONT if point in best else OTHER
        bars = [[point.score - point.low], [point.high - point.score]]
        fill = PAPER if colour is OTHER else colour
        marker = {"marker": "o", "markersize": 2 * RADIUS * 72 / DPI, "markerfacecolor": fill}
        axes.errorbar(point.flops, point.score, bars, color=colour, capsize=3, elinewidth=1.2, zorder=3, **marker)
    _add_labels(axes, points, best, unpruned)


def _add_labels(axes: Any, points: Sequence[Point], best: Sequence[Point], unpruned: Point | None) -> None:
    """Write the names next to the points, with a line to distant ones."""
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    texts = _name_texts(axes, points, best, unpruned)
    extents = [text.get_window_extent(renderer) for text in texts]

    def pixels(flops: Number, score: Number) -> tuple[float, float]:
        x, y = axes.transData.transform((flops, score))
        return float(x), float(frame.y1 - y)  # labels use a y axis that points down

    middles = [pixels(point.flops, point.score) for point in points]
    obstacles = [Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in middles]
    for point, (x, _) in zip(points, middles, strict=True):
        obstacles.append(
            Box(x - 4, pixels(point.flops, point.high)[1] - 1, x + 4, pixels(point.flops, point.low)[1] + 1)
        )
    if unpruned is not None:
        y = pixels(0, unpruned.score)[1]
        obstacles.append(Box(frame.x0, y - 1, frame.x1, y + 1))
    obstacles += _line_boxes([pixels(point.flops, point.score) for point in best])
    area = Box(float(frame.x0) + 2, 0.0, float(frame.x1), float(frame.height))
    boxes = place_labels(middles, [(extent.width + 4, extent.height + 4) for extent in extents], area, obstacles)
    for text, (x, y), box in zip(texts, middles, boxes, strict=True):
        nearest = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
        if hypot(nearest[0] - x, nearest[1] - y) > 24:
            ends = [axes.transData.inverted().transform((px, frame.y1 - py)) for px, py in ((x, y), nearest)]
            axes.plot(*zip(*ends, strict=True), color=SOFT, alpha=0.6, linewidth=0.8)
        middle = ((box.left + box.right) / 2, frame.y1 - (box.top + box.bottom) / 2)
        text.set_position(axes.transData.inverted().transform(middle))


def _name_texts(axes: Any, points: Sequence[Point], best: Sequence[Point], unpruned: Point | None) -> list[Any]:
    """The names of all points as texts, not yet placed."""
    texts = []
    for point in points:
        name = "unpruned" if point is unpruned else _truncate(point.name, 32)
        colour, weight = (UNPRUNED, "bold") if point is unpruned else (INK, "bold" if point in best else "normal")
        label, (x, y) = f"{name} {point.score:.1f}", (point.flops, point.score)
        texts.append(axes.text(x, y, label, ha="center", va="center", color=colour, fontweight=weight, zorder=4))
    return texts


def _subtitle(report: Mapping[str, Any]) -> str:
    counts = [plan["all"]["n"] for plan in report["plans"].values()]
    fewest, most = min(counts), max(counts)
    samples = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return f"{samples} samples per plan · bars: 95 % interval · line: plans that no other beats with as few FLOPs"


def _line_boxes(corners: Sequence[tuple[Number, Number]]) -> list[Box]:
    """Small boxes along a line."""
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(1, int(hypot(x1 - x0, y1 - y0) / 6))
        middles = ((x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1))
        boxes += [Box(x - 1, y - 1, x + 1, y + 1) for x, y in middles]
    return boxes


def _truncate(text: str, most: int = 140) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _with_dark_colours(drawing: bytes) -> bytes:
    """The SVG with colours that change with a dark theme."""
    text = drawing.decode()
    names = {colour: f"--c{number}" for number, colour in enumerate(DARK)}
    for colour, name in names.items():
        text = text.replace(colour, f"var({name})")
    light, dark = (
        " ".join(f"{names[colour]}: {theme[colour]};" for colour in DARK) for theme in ({c: c for c in DARK}, DARK)
    )
    style = f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    head, _, rest = text.partition(" <defs>")
    return f"{head} {style}\n <defs>{rest}".encode()
