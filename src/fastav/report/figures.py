"""The figures of a report, as SVG inside HTML: without namespaces, with the page's font and colour variables.

Every figure is drawn in a wide and a narrow version, because a wide one is unreadable on a phone.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from fastav.calibrate import TOP
from fastav.layout import Modality
from fastav.report.content import Curve, ModalityCut

INK, SOFT, GRID, HATCH, PAPER = "#1f2328", "#59636e", "#d8dee4", "#a9b3bd", "#fffffe"
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", HATCH: "hatch", PAPER: "paper"}
# of medium brightness, so that they are visible in both themes
COLOURS = {Modality.TEXT: "#7d8590", Modality.AUDIO: "#d0660a", Modality.VIDEO: "#2f7fd6", Modality.IMAGE: "#1f9d6b"}
HATCHES = {Modality.TEXT: "", Modality.AUDIO: "////", Modality.VIDEO: "", Modality.IMAGE: "...."}
HEADS = {"attention": "Attention of the last query", "rollout": "Rollout of the last query"}
HEAT = "magma"
WIDE, NARROW = 960, 350
FONT = "DejaVu Sans"  # comes with matplotlib; used to measure texts, and wider than the page's own font
SIZED = ("font.", "axes.title", "axes.label", "xtick.label", "ytick.label", "legend.font")
LETTER, MARGIN = 6.4, 70  # mean width of a bold letter, and the width of labels beside a panel, in pixels
DECADES = 4  # range of a heat map at most
NO_LOSS = 1e-6  # the smallest divergence that is drawn, in nats
LONGEST_NAME = 24  # characters of a plan's name
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastav",
    "font.family": FONT,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "figure.constrained_layout.h_pad": 0.11,
    "figure.constrained_layout.w_pad": 0.02,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.9,
    "legend.frameon": False,
}

Draw = Callable[[Any], None]


def heat(
    maps: Mapping[str, Float[np.ndarray, "layers columns"]],
    tracks: Mapping[Modality, Float[np.ndarray, " columns"]],
    positions: int,
    start: int,
    *,
    narrow: bool,
) -> str:
    """A heat map for each kind, one above the other, and the modalities of the positions below."""
    depth = len(next(iter(maps.values())))
    high = float(np.clip(13 * depth, 130, 260))

    def draw(figure: Any) -> None:
        low = 15 * len(tracks)
        rows = figure.subplots(len(maps) + 1, 1, sharex=True, height_ratios=[*(high for _ in maps), low])
        for axes, (kind, weights) in zip(rows, maps.items(), strict=False):
            _heat_map(figure, axes, weights, positions, start, narrow)
            axes.set_title(f"{HEADS[kind]}, share per token" if not narrow else HEADS[kind])
        _tracks(rows[-1], tracks, positions)
        rows[-1].set_xlabel("position in the prompt")
        rows[-1].xaxis.set_major_formatter(_thousands)

    return _svg("heat", narrow, len(maps) * (high + 38) + 15 * len(tracks) + 60, draw)


def _heat_map(
    figure: Any, axes: Any, weights: Float[np.ndarray, "layers columns"], positions: int, start: int, narrow: bool
) -> None:
    depth = len(weights)
    highest = float(weights.max(initial=0)) or 1.0
    positive = weights[weights > 0]
    lowest = max(float(np.quantile(positive, 0.02)) if len(positive) else 0.0, highest * 10.0**-DECADES)
    lowest = min(lowest, highest / 2)  # also if all values are equal
    image = axes.imshow(
        np.maximum(weights, lowest),
        cmap=HEAT,
        norm=LogNorm(lowest, highest),
        aspect="auto",
        interpolation="none",
        extent=(0, positions, depth - 0.5, -0.5),
    )
    for colour, width, dashes in ((PAPER, 3.2, "-"), (INK, 1.4, (0, (4, 2.5)))):
        axes.axhline(start - 0.5, color=colour, linewidth=width, linestyle=dashes)
    mark = axes.annotate("◂ cut", (1, start - 0.5), (4, 0), ("axes fraction", "data"), "offset points", va="center")
    mark.set_in_layout(False)  # it is in the gap before the colour bar
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(_layers(depth))
    axes.tick_params(labelbottom=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.02, aspect=26 if narrow else 18, pad=0.16 if narrow else 0.05)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_locator(LogLocator(numticks=6))
    bar.ax.yaxis.set_major_formatter(_share)


def _tracks(axes: Any, tracks: Mapping[Modality, Float[np.ndarray, " columns"]], positions: int) -> None:
    """A line for each modality, with its share of the prompts at each position as opacity."""
    for line, (modality, share) in enumerate(tracks.items()):
        pixels = np.ones((1, len(share), 4))
        pixels[..., :3] = to_rgb(COLOURS[modality])
        pixels[0, :, 3] = share
        axes.imshow(pixels, aspect="auto", interpolation="none", extent=(0, positions, line + 0.4, line - 0.4))
    axes.set_ylim(len(tracks) - 0.5, -0.5)
    axes.set_yticks(range(len(tracks)), [m.label for m in tracks])
    axes.set_xlim(0, positions)
    axes.spines[["left", "bottom"]].set_visible(False)


def curves(
    curves_by_kind: Mapping[tuple[str, Modality], Curve],
    cuts: Mapping[Modality, ModalityCut],
    cut_texts: Mapping[Modality, str],
    *,
    seconds: bool,
    narrow: bool,
) -> str:
    """Panels of weight by order or by second, one for each kind and modality.

    cut_texts: for each modality, the effect of the cut.
    """
    modalities = list(dict.fromkeys(m for _, m in curves_by_kind))
    kinds = list(dict.fromkeys(kind for kind, _ in curves_by_kind))
    shape = (len(kinds) * len(modalities), 1) if narrow else (len(kinds), len(modalities))

    def draw(figure: Any) -> None:
        grid = figure.subplots(*shape, squeeze=False)
        if narrow:
            grid = grid.reshape(len(modalities), len(kinds)).T
        for row, kind in zip(grid, kinds, strict=True):
            low, high = _bounds([curves_by_kind[kind, m] for m in modalities])
            for axes, m in zip(row, modalities, strict=True):
                _curve(axes, curves_by_kind[kind, m], m, low, high)
                _hatch_dropped(axes, curves_by_kind[kind, m], cuts[m], seconds=seconds)
                if narrow:
                    axes.set_title(_title(f"{m.label}, {kind}", cut_texts[m] if kind == kinds[0] else "", NARROW))
                elif kind == kinds[0]:
                    axes.set_title(_title(m.label, cut_texts[m], WIDE / len(modalities)))
                if m == modalities[0] and not narrow:
                    axes.set_ylabel(kind)
                if kind == kinds[-1]:
                    axes.set_xlabel("second of the clip" if seconds else f"{m.label} tokens, in order")

    high = 118 if narrow else 150
    return _svg("seconds" if seconds else "order", narrow, shape[0] * (high + 26) + 40, draw)


def _title(label: str, text: str, room: float | int) -> str:
    """The title on one line, or on two if it is too long."""
    line = f"{label}: {text}" if text else label
    return line if len(line) * LETTER < room - MARGIN else f"{label}:\n{text}"


def _bounds(curves: Sequence[Curve]) -> tuple[float, float]:
    """The limits of a logarithmic axis."""
    values = np.concatenate([curve.mean for curve in curves])
    tops = np.concatenate([curve.mean + np.nan_to_num(curve.spread) for curve in curves])
    highest = float(tops.max()) or 1.0
    return max(float(values.min(initial=highest, where=values > 0)) / 1.6, highest * 1e-6), highest * 1.5


def _curve(axes: Any, curve: Curve, modality: Modality, low: float, high: float) -> None:
    colour = COLOURS[modality]
    mean = np.maximum(curve.mean, low)
    down, up = np.maximum(curve.mean - curve.spread, low), np.maximum(curve.mean + curve.spread, low)
    axes.set_yscale("log")
    axes.set_xlim(0, curve.edges[-1])
    axes.set_ylim(low, high)
    if len(mean) <= 40:  # few values are drawn as steps, because a line would suggest values in between
        options = {"step": "post"}
        x, mean, down, up = curve.edges, *(np.append(values, values[-1:]) for values in (mean, down, up))
    else:
        options, x = {}, (curve.edges[:-1] + curve.edges[1:]) / 2
    axes.fill_between(x, down, up, color=colour, alpha=0.18, linewidth=0, **options)
    axes.plot(x, mean, color=colour, linewidth=1.8, drawstyle="steps-post" if options else "default")
    axes.grid(axis="y")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(_decades(low, high))
    axes.yaxis.set_major_formatter(_share)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(_thousands)


def _decades(low: float, high: float) -> FixedLocator:
    """Powers of ten, at most five; if there is only one or none, also 2 and 5 times powers of ten."""
    powers = np.arange(np.ceil(np.log10(low)), np.floor(np.log10(high)) + 1)
    if len(powers) < 2:
        ticks = np.array([f * 10.0**p for p in np.arange(np.floor(np.log10(low)), np.log10(high)) for f in (1, 2, 5)])
        return FixedLocator(ticks[(ticks >= low) & (ticks <= high)].tolist())
    return FixedLocator((10.0 ** powers[:: int(np.ceil(len(powers) / 5))]).tolist())


def _hatch_dropped(axes: Any, curve: Curve, cut: ModalityCut, *, seconds: bool) -> None:
    """Hatch the dropped tokens; if the cut differs between prompts, from its mean on."""
    places = (
        cut.seconds if seconds else cut.remaining[cut.remaining < cut.total] if len(cut.remaining) else cut.remaining
    )
    if not cut.is_prefix or not len(places):
        return
    place, end = float(places.mean()), float(curve.edges[-1])
    axes.axvspan(place, end, facecolor="none", edgecolor=HATCH, hatch="\\\\\\", linewidth=0, zorder=0.5)
    axes.axvline(place, color=INK, linewidth=1.4, linestyle=(0, (4, 2.5)), clip_on=False)


def concentration(
    mean: Float[np.ndarray, "kinds layers"], spread: Float[np.ndarray, "kinds layers"], start: int, *, narrow: bool
) -> str:
    """The share of the weight that the heaviest tokens have, by layer."""
    depth = mean.shape[1]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        layers = np.arange(depth)
        styles = (("attention", INK, "-", "o"), ("rollout", COLOURS[Modality.VIDEO], "--", "s"))
        for (kind, colour, dashes, marker), middle, deviation in zip(styles, mean, spread, strict=True):
            down, up = np.clip(middle - deviation, 0, 1), np.clip(middle + deviation, 0, 1)
            axes.fill_between(layers, down, up, color=colour, alpha=0.14, linewidth=0)
            axes.plot(
                layers,
                middle,
                color=colour,
                linewidth=1.8,
                linestyle=dashes,
                marker=marker,
                markersize=4,
                clip_on=False,
            )
            axes.plot([], [], color=colour, linestyle=dashes, marker=marker, markersize=4, label=kind)
        axes.axhline(TOP, color=SOFT, linewidth=1, linestyle=":", label=f"if all were equal ({_percent(TOP)})")
        axes.axvline(start - 0.5, color=INK, linewidth=1.4, linestyle=(0, (4, 2.5)))
        axes.annotate("cut", (start - 0.5, 1), (0, 4), ("data", "axes fraction"), "offset points", ha="center")
        axes.set_xlim(-0.5, depth - 0.5)
        axes.set_ylim(0, 1)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(_layers(depth))
        axes.yaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
        axes.yaxis.set_major_formatter(_percent)
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=1 if narrow else 3, handlelength=3)

    return _svg("concentration", narrow, 290 if not narrow else 300, draw)


def waveform(
    peaks: Float[np.ndarray, "2 parts"],
    duration: float | int,
    segments: Sequence[tuple[float, float, float]],
    *,
    narrow: bool,
) -> str:
    """The waveform. The parts that remain are coloured, with a bar below; without segments all is plain."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        moments = np.linspace(0, duration, peaks.shape[1])
        loudest = float(np.abs(peaks).max(initial=0)) or 1.0
        down, up = peaks[0] / loudest, peaks[1] / loudest
        axes.fill_between(moments, down, up, color=SOFT, alpha=0.45, linewidth=0.4)
        for span, share in _remaining_runs(moments, segments):
            colour = COLOURS[Modality.AUDIO]
            axes.fill_between(moments[span], down[span], up[span], color=colour, alpha=share, linewidth=0.4)
            axes.fill_between(moments[span], -1.32, -1.18, color=INK, alpha=share, linewidth=0)
        axes.set_xlim(0, duration)
        axes.set_ylim(-1.4, 1.05)
        axes.set_yticks([-1.25] if segments else [], ["stays"] if segments else [])
        axes.set_xlabel("second of the clip")
        axes.spines[["left"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 10, steps=[1, 2, 2.5, 5, 10]))

    return _svg("waveform", narrow, 130 if narrow else 150, draw)


def _remaining_runs(
    moments: Float[np.ndarray, " parts"], segments: Sequence[tuple[float, float, float]]
) -> Iterator[tuple[slice, float]]:
    """Runs of moments with an equal remaining share, in steps of 5 %; runs with a share of 0 are left out."""
    if not segments:
        return
    begins, ends, shares = map(np.array, zip(*segments, strict=True))
    cumulative = np.append(0, np.cumsum((ends - begins) * shares))  # remaining seconds up to the end of each segment
    shares_between = np.diff(np.interp(moments, np.append(begins, ends[-1]), cumulative)) / np.diff(moments)
    shares_between = np.round(shares_between * 20) / 20
    first = np.flatnonzero(np.diff(shares_between, prepend=-1.0))
    for start, end in zip(first, [*first[1:], len(shares_between)], strict=True):
        if shares_between[start]:
            yield slice(start, end + 1), float(shares_between[start])


def layers(
    pruned: Sequence[Mapping[str, int]], unpruned: Sequence[Mapping[str, int]], start: int, *, narrow: bool
) -> str:
    """Tokens of every layer by modality with the plan, and the outline of those without it."""
    depth = len(pruned)
    present = [m for m in Modality if any(layer.get(m.label) for layer in unpruned)]
    unpruned_totals = [sum(layer.values()) for layer in unpruned]
    pruned_totals = [sum(layer.values()) for layer in pruned]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        below = np.zeros(depth)
        for m in present:
            counts = np.array([layer.get(m.label, 0) for layer in pruned], float)
            axes.bar(
                range(depth),
                counts,
                0.84,
                bottom=below,
                color=COLOURS[m],
                hatch=HATCHES[m],
                edgecolor=PAPER,
                linewidth=0,
                label=m.label,
            )
            below += counts
        axes.stairs(unpruned_totals, np.arange(depth + 1) - 0.5, color=INK, linewidth=1.4, linestyle=(0, (4, 2.5)))
        label_all = 1 if depth <= (16 if not narrow else 8) else 0
        for layer in range(depth) if label_all else sorted({start, depth - 1}):
            if pruned_totals[layer] < unpruned_totals[layer]:
                axes.annotate(
                    f"{pruned_totals[layer]:,}",
                    (layer, pruned_totals[layer]),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                )
        axes.annotate(
            f"unpruned: {unpruned_totals[-1]:,}",
            (depth - 0.5, unpruned_totals[-1]),
            (0, 6),
            textcoords="offset points",
            ha="right",
        )
        axes.set_xlim(-0.6, depth - 0.4)
        axes.set_ylim(0, max(unpruned_totals) * 1.1)
        axes.set_xlabel("layer")
        axes.set_ylabel("tokens")
        axes.xaxis.set_major_locator(_layers(depth))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(_thousands)
        axes.grid(axis="y")
        handles = [
            Patch(facecolor=COLOURS[m], hatch=HATCHES[m], edgecolor=PAPER, linewidth=0, label=m.label) for m in present
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=1.6, columnspacing=1.4)

    return _svg("layers", narrow, 270 if narrow else 320, draw)


def losses(plans: Mapping[str, Mapping[str, Any]], max_kl: float | None, *, narrow: bool) -> str:
    """The divergence and the FLOPs of every plan, cheapest first, with intervals and the threshold.

    plans: as in a report of `fastav.verify`, those with answers.
    """
    names = sorted(plans, key=lambda name: plans[name]["flops_ratio"])
    rows = np.arange(len(names))

    def draw(figure: Any) -> None:
        panels = figure.subplots(2, 1) if narrow else figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for axes in panels:
            axes.set_yticks(rows, [_truncated(name) for name in names])
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.spines["left"].set_visible(False)
            axes.grid(axis="x")
        _divergences(panels[0], [plans[name]["kl"] for name in names], max_kl)
        panels[1].barh(rows, [plans[name]["flops_ratio"] for name in names], 0.5, color=COLOURS[Modality.VIDEO])
        panels[1].set_xlim(0, 1)
        panels[1].xaxis.set_major_formatter(_percent)
        panels[1].set_title("Prefill FLOPs, share of the unpruned")

    height = 26 * len(names) + 70
    return _svg("losses", narrow, 2 * height if narrow else height, draw)


def _divergences(axes: Any, divergences: Sequence[Mapping[str, Any]], max_kl: float | None) -> None:
    """Means with intervals, on a logarithmic axis that ends where rounding begins."""
    for row, divergence in enumerate(divergences):
        low, high = (max(NO_LOSS, bound) for bound in divergence["interval"] or (divergence["mean"],) * 2)
        axes.plot([low, high], [row, row], color=COLOURS[Modality.AUDIO], linewidth=2, solid_capstyle="round")
        axes.plot(max(NO_LOSS, divergence["mean"]), row, "o", color=COLOURS[Modality.AUDIO], markersize=7)
    if max_kl:
        axes.axvline(max_kl, color=INK, linewidth=1.4, linestyle=(0, (4, 2.5)))
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.5, high * 1.5)
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("KL divergence, nats per token")


def _truncated(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _layers(depth: int) -> MaxNLocator | FixedLocator:
    return FixedLocator(range(depth)) if depth <= 16 else MaxNLocator(8, integer=True)


def _share(value: float | int, _: int | None = None) -> str:
    """The label of a tick on a logarithmic axis: `0.1 %`, or a power of ten."""
    if value >= 9.9e-6:
        return f"{100 * value:.4g} %"
    return "10" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] if digit != "-" else "⁻" for digit in f"{np.log10(value):.0f}")


def _thousands(value: float | int, _: int | None = None) -> str:
    return f"{value:,.0f}"


def _percent(value: float | int, _: int | None = None) -> str:
    return f"{100 * value:.0f} %"


def _svg(name: str, narrow: bool, height: float | int, draw: Draw) -> str:
    """Draw a figure of this height in pixels, as SVG for use inside HTML."""
    size, width = (11.5, NARROW) if narrow else (12.5, WIDE)
    sizes = dict.fromkeys([f"{part}size" for part in SIZED], size)
    with style.context(["default", {**STYLE, **sizes}]):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        draw(figure)
        file = StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})  # savefig would draw twice
    return _inline_svg(file.getvalue(), f"{name}-{'narrow' if narrow else 'wide'}")


def _inline_svg(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    kind = name.rpartition("-")[2]
    svg = re.sub(r"<svg[^>]*>", f'<svg class="{kind}" {box[0]} style="stroke-linejoin: round">', svg, count=1)
    svg = svg.replace("xlink:href", "href").replace(f"font-family: '{FONT}'", "font-family: inherit")
    referenced = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg))
    referenced = {one for pair in referenced for one in pair if one}
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in referenced else "", svg)
    svg = re.sub(r'url\(#|href="#', lambda m: f"{m[0]}{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", svg)
