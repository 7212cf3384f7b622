"""Score against FLOPs as SVG: one panel for every model and task, one point for every plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import floor, hypot, log10
from typing import Any

from fastav.evaluate import wording
from fastav.evaluate.labels import Box, Number, placed

Place = tuple[Number, Number]

WIDTH, LEFT, RIGHT, TOP, BOTTOM, PLOT = 900, 64, 28, 74, 78, 330
FONT, LETTER = 13, 7.8  # size, and how wide a letter is at most, on average
RADIUS = 5.5

STYLE = """
  svg { --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --grid: #e4e8ec; --front: #0969da; --other: #8c959f;
        --whole: #bc4c00; --band: #bc4c0014 }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117; --ink: #e6edf3; --soft: #9198a1; --grid: #262c36; --front: #58a6ff; --other: #7d8590;
          --whole: #f0883e; --band: #f0883e1f } }
  text { font: 13px -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: var(--ink) }
  .title { font-size: 16px; font-weight: 600 } .soft { fill: var(--soft); font-size: 12px }
  .fine { fill: var(--soft); font-size: 10.5px } .on { font-weight: 600 }
  .whole { fill: var(--whole); font-weight: 600 }
  .grid { stroke: var(--grid) } .band { fill: var(--band) } .unpruned { stroke: var(--whole); stroke-dasharray: 6 4 }
  .front { stroke: var(--front); stroke-width: 2; fill: none; opacity: .55 } .lead { stroke: var(--soft); opacity: .6 }
  .bar { stroke-width: 1.5 } .best { fill: var(--front); stroke: var(--front) }
  .rest { fill: var(--paper); stroke: var(--other); stroke-width: 2 } .rest.bar { stroke-width: 1.5 }
  .full { fill: var(--whole); stroke: var(--whole) }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A plan: FLOPs in percent of the unpruned model's, score and its standard error in points."""

    name: str
    flops: Number
    score: Number
    error: Number


def chart(reports: Sequence[Mapping[str, Any]]) -> str:
    """The panels, under each other."""
    height = len(reports) * (TOP + PLOT + BOTTOM)
    what = "; ".join(wording.asked(report) for report in reports)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">',
            f"<title>{escape(f'Score against FLOPs: {what}')}</title>",
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height}" fill="var(--paper)"/>',
            *(
                line
                for i, report in enumerate(reports)
                for line in (
                    f'<g transform="translate(0 {i * (TOP + PLOT + BOTTOM)})">',
                    *_panel(report),
                    "</g>",
                )
            ),
            "</svg>",
            "",
        ]
    )


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, by FLOPs: the points that no other beats at as few FLOPs."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.flops, -point.score)):
        if not best or point.score > best[-1].score:
            best.append(point)
    return best


def ticks(low: Number, high: Number, most: int = 6) -> list[Number]:
    """Round numbers from at or below `low` to at or above `high`."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** floor(log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * (1 - 1e-9))
    first = floor(low / step + 1e-9)
    count = next(n for n in range(1, most + 2) if (first + n) * step >= high - 1e-9 * step)
    return [round((first + n) * step, 10) for n in range(count + 1)]


class _Scale:
    """From FLOPs and scores to the panel."""

    def __init__(self, points: Sequence[Point]) -> None:
        most = max(100.0, *(point.flops for point in points))
        self.flops = ticks(0, most)
        low = max(0.0, min(point.score - point.error for point in points))
        high = min(100.0, max(point.score + point.error for point in points))
        air = max(1.0, 0.15 * (high - low))
        self.scores = ticks(max(0.0, low - air), min(100.0, high + air))

    def x(self, flops: Number) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * flops / self.flops[-1]

    def y(self, score: Number) -> float:
        low, high = self.scores[0], self.scores[-1]
        return TOP + PLOT * (high - score) / (high - low)


def _panel(report: Mapping[str, Any]) -> list[str]:
    points = [
        Point(
            name=name,
            flops=100 * every["flops_ratio"],
            score=100 * every["score"],
            error=100 * (every["stderr"] or 0),
        )
        for name, plan in report["plans"].items()
        if (every := plan["all"])["score"] is not None
    ]
    lines = [
        _text(LEFT, 28, f"{report['model']} on {report['task']}", "title"),
        _text(LEFT, 48, _subtitle(report), "soft"),
        _text(LEFT, TOP + PLOT + BOTTOM - 12, _short(wording.circumstances(report)), "fine"),
    ]
    if not points:
        return [*lines, _text(WIDTH / 2, TOP + PLOT / 2, "no answers yet", "soft", "middle")]
    scale, best = _Scale(points), front(points)
    whole = next((point for point in points if point.name == report["reference"]), None)
    return [
        *lines,
        *_axes(scale),
        *(_unpruned(whole, scale) if whole else []),
        f'<path class="front" d="{_path([(scale.x(p.flops), scale.y(p.score)) for p in best])}"/>',
        *(
            line
            for point in points
            for line in _drawn(point, scale, "full" if point is whole else "best" if point in best else "rest")
        ),
        *_names(points, best, scale, whole),
    ]


def _subtitle(report: Mapping[str, Any]) -> str:
    counts = [plan["all"]["n"] for plan in report["plans"].values()]
    fewest, most = min(counts), max(counts)
    samples = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return (
        f"{samples} samples a plan · bars: ± 1 standard error · joined by a line: no plan scores more with as few FLOPs"
    )


def _axes(scale: _Scale) -> list[str]:
    lines = []
    for score in scale.scores:
        y = scale.y(score)
        lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        lines.append(_text(LEFT - 10, y + 4, f"{score:g}", "soft", "end"))
    for flops in scale.flops:
        lines.append(_text(scale.x(flops), TOP + PLOT + 20, f"{flops:g} %", "soft", "middle"))
    lines.append(_text(LEFT - 10, TOP - 17, "score", "soft", "end"))
    lines.append(_text(WIDTH - RIGHT, TOP + PLOT + 40, "prefill FLOPs, of the unpruned model's", "soft", "end"))
    return lines


def _unpruned(whole: Point, scale: _Scale) -> list[str]:
    top, bottom = (scale.y(min(max(s, scale.scores[0]), scale.scores[-1])) for s in _bounds(whole))
    width = WIDTH - LEFT - RIGHT
    return [
        f'<rect class="band" x="{LEFT}" y="{top:.1f}" width="{width}" height="{bottom - top:.1f}"/>',
        f'<path class="unpruned" d="M{LEFT} {scale.y(whole.score):.1f}H{WIDTH - RIGHT}"/>',
    ]


def _drawn(point: Point, scale: _Scale, kind: str) -> list[str]:
    x, y = scale.x(point.flops), scale.y(point.score)
    top, bottom = (scale.y(score) for score in _bounds(point))
    told = f"{point.name}: {point.score:.1f} ± {point.error:.1f} at {point.flops:.1f} % of the FLOPs"
    whiskers = f"M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 4:.1f} {top:.1f}h8M{x - 4:.1f} {bottom:.1f}h8"
    return [
        f'<path class="{kind} bar" fill="none" d="{whiskers}"/>',
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"><title>{escape(told)}</title></circle>',
    ]


def _names(points: Sequence[Point], best: Sequence[Point], scale: _Scale, whole: Point | None) -> list[str]:
    """Names beside the points, with a line to those that stand further off."""
    middles = [(scale.x(point.flops), scale.y(point.score)) for point in points]
    words = [f"{'unpruned' if p is whole else _short(p.name, 32)} {p.score:.1f}" for p in points]
    sizes = [(LETTER * len(word), FONT + 5.0) for word in words]
    taken = [Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in middles]
    for point, (x, _) in zip(points, middles, strict=True):
        high, low = (scale.y(score) for score in _bounds(point))
        taken.append(Box(x - 4, high - 1, x + 4, low + 1))
    if whole:
        y = scale.y(whole.score)
        taken.append(Box(LEFT, y - 1, WIDTH - RIGHT, y + 1))
    taken += _along([(scale.x(p.flops), scale.y(p.score)) for p in best])
    boxes = placed(middles, sizes, Box(LEFT + 2, TOP, WIDTH - RIGHT, TOP + PLOT), taken)
    lines = []
    for point, word, (x, y), box in zip(points, words, middles, boxes, strict=True):
        near = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
        if hypot(near[0] - x, near[1] - y) > 24:
            lines.append(f'<path class="lead" d="{_path([(x, y), near])}"/>')
        kind = "whole" if point is whole else "on" if point in best else ""
        lines.append(_text((box.left + box.right) / 2, (box.top + box.bottom) / 2 + 4.5, word, kind, "middle"))
    return lines


def _along(corners: Sequence[Place]) -> list[Box]:
    """Small boxes that cover a line."""
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(1, int(hypot(x1 - x0, y1 - y0) / 6))
        middles = ((x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1))
        boxes += [Box(x - 1, y - 1, x + 1, y + 1) for x, y in middles]
    return boxes


def _bounds(point: Point) -> Place:
    return min(100.0, point.score + point.error), max(0.0, point.score - point.error)


def _path(corners: Sequence[Place]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)


def _short(text: str, most: int = 140) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(x: Number, y: Number, words: str, kind: str = "", anchor: str = "start") -> str:
    style = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(words)}</text>'
