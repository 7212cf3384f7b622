"""The page: what a calibration found, as one HTML text without a reference to anything outside of it."""

import base64
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastav.calibrate import KINDS, TOP, Record
from fastav.errors import InstallationError, install_hint
from fastav.layout import MEDIA, Modality
from fastav.report import words
from fastav.report.content import (
    COLUMNS,
    LAST,
    Content,
    Cut,
    curves,
    cuts,
    holders,
    maps,
    pictures,
    read,
    stretches,
    survivors,
    tokens,
    tracks,
)

try:
    import jinja2

    from fastav.report import figures
except ImportError as error:
    raise InstallationError(f"a report takes {error.name}, which is not installed", install_hint("report")) from None


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure, for wide screens and narrow ones, and what it shows in words."""

    wide: str
    narrow: str
    alt: str


def page(folder: str | Path) -> str:
    """The report of a finished calibration as HTML.

    folder: what `fastav.calibrate.Calibration` was given; it is read only.
    Raises: CalibrationError if there is no finished calibration, or its files cannot be read; PlanError if its plan
    cannot be read.
    """
    content = read(Path(folder))
    template = resources.files("fastav.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": words.percent, "second": words.second}
    return environment.from_string(template).render(_context(content))


def _context(content: Content) -> dict[str, Any]:
    found = cuts(content)
    stays = {m: _stays(cut) for m, cut in found.items()}
    return {
        "model": content.head["model"],
        "source": content.head["source"],
        "depth": content.depth,
        "before": content.before,
        "start": content.start,
        "columns": COLUMNS,
        "top": TOP,
        "sentences": words.plan(content.plan, content.depth, content.evidence.present()),
        "numbers": list(_numbers(content)),
        "facts": list(_facts(content)),
        "small_print": _small_print(content),
        "plan": content.plan.to_json(),
        "longest": max(map(len, content.evidence.layouts)),
        "prompts": len(content.evidence.layouts),
        "ordered": all(cut.ordered for cut in found.values()),
        "holders": _holders(content),
        "figures": _drawings(content, found, stays),
        "concentration": _concentration(content),
        "shown": _shown(content),
        "layers": _layers(content),
        "costs": _costs(content),
        "unpruned": content.unpruned,
        "pruned": content.pruned,
        "failures": [(clip, count, reason) for (clip, reason), count in Counter(content.failures).items()],
    }


def _numbers(content: Content) -> Iterator[tuple[str, str, str]]:
    """The large ones: value, what it is, and of what."""
    prompts, there = len(content.evidence.layouts), _mean_media(content)
    yield words.percent(content.flops), "prefill FLOPs", "against the unpruned model; mean over prompts"
    yield words.percent(content.kv), "KV cache", "against the unpruned model; mean over prompts"
    tokens = f"of {words.number(there)} audio and video tokens, from the cut on; mean over prompts"
    yield words.number(content.tokens), "tokens stay", tokens
    if content.held is not None:
        yield words.percent(content.held), "of the rollout stays", "of what audio and video have where the cut is made"
    clips = content.origin.get("clips")
    yield f"{prompts:,}", "prompts" if prompts != 1 else "prompt", f"on {words.plural(clips, 'clip')}" if clips else ""


def _mean_media(content: Content) -> float:
    return float(np.mean([layout.count(*MEDIA) for layout in content.evidence.layouts]))


def _facts(content: Content) -> Iterator[tuple[str, str]]:
    criterion, rule = content.origin.get("criterion"), content.origin.get("rule")
    if criterion and rule in words.RULES:
        yield "Rule", words.rule(criterion["rule"], rule)
        yield "Budget", words.budget(criterion)
        yield "Cut", words.start(criterion["start"], content.start)
    yield "Decoder", f"{content.depth} layers of width {content.head['hidden']:,}"
    yield "Rollout", f"alpha = {content.head['alpha']:g}"


def _small_print(content: Content) -> list[tuple[str, str]]:
    origin = content.origin
    told = [("Plan", content.plan.fingerprint)]
    if "date" in origin:
        told.append(("Made", words.date(origin["date"])))
    told.append(("Commit", origin.get("commit") or "unknown"))
    told.append(("Machine", words.machine(origin.get("machine", {}), content.head)))
    told.append(("Versions", ", ".join(f"{name} {version}" for name, version in origin.get("versions", {}).items())))
    return told


def _stays(cut: Cut) -> str:
    """`the first 35 of 64 stay`, where numbers differ between prompts from least to most."""
    if not len(cut.kept):
        return "the scores decide"
    there = _range(cut.there)
    if not cut.kept.any():
        return f"none of {there} stay"
    if (cut.kept >= cut.there).all():
        return f"all {there} stay"
    return f"{'the first ' if cut.ordered else ''}{_range(cut.kept)} of {there} stay"


def _range(counts: np.ndarray) -> str:
    least, most = int(counts.min()), int(counts.max())
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def _holders(content: Content) -> list[tuple[str, list[float]]]:
    """Of each modality, its share of every kind's weight."""
    shares = [holders(content, kind) for kind in KINDS]
    return [(m.label, [share[m] for share in shares]) for m in content.evidence.present()]


def _drawings(content: Content, found: dict[Modality, Cut], stays: dict[Modality, str]) -> dict[str, Drawing]:
    def both(alt: str, draw: Callable[..., str], *arguments: Any, **options: Any) -> Drawing:
        wide, narrow = (draw(*arguments, **options, narrow=narrow) for narrow in (False, True))
        return Drawing(wide, narrow, alt)

    evidence, start, shown = content.evidence, content.start, content.shown
    longest = max(map(len, evidence.layouts))
    told = "; ".join(f"{m.label}: {text}" for m, text in stays.items())
    drawings = {
        "heat": both(
            f"Two heat maps, {content.depth} layers by {longest:,} positions, of attention and of rollout of the last "
            f"query, and below them which modality stands where. A dashed line before layer {start} marks the cut. "
            "The table that follows tells whose tokens hold the weight.",
            figures.heat,
            maps(evidence),
            tracks(evidence),
            longest,
            start,
        ),
        "concentration": both(
            f"Lines by layer of the share that the heaviest {TOP:.0%} of the audio and video tokens hold, for "
            "attention and for rollout. The table that follows has the numbers.",
            figures.concentration,
            *_top(content),
            start,
        ),
        "layers": both(
            "Bars of the tokens that every layer runs on with the plan, by modality, under the outline of what it "
            "would run on without. The table that follows has the numbers.",
            figures.layers,
            content.pruned.layers,
            content.unpruned.layers,
            start,
        ),
    }
    for axis in ("order", "second"):
        if data := curves(content, axis):
            drawings[axis] = both(
                f"Curves of the mean attention and the mean rollout of a token by {axis}, with a band of one standard "
                f"deviation over prompts; what goes at the cut is hatched. {told}.",
                figures.curves,
                data,
                found,
                stays,
                seconds=axis == "second",
            )
    if shown.look.peaks.shape[1]:
        stay, there = tokens(shown.trace.layout, [Modality.AUDIO], survivors(shown, start))
        drawings["waveform"] = both(
            f"Waveform of the clip, {shown.look.duration:.1f} seconds. {stay:,} of {there:,} audio tokens stay.",
            figures.waveform,
            shown.look.peaks,
            shown.look.duration,
            list(stretches(shown, start)),
        )
    return drawings


def _top(content: Content) -> tuple[np.ndarray, np.ndarray]:
    moments = content.evidence.concentration
    return moments.mean[:, LAST, :, 0], moments.spread[:, LAST, :, 0]


def _concentration(content: Content) -> list[tuple[int, list[float]]]:
    mean, _ = _top(content)
    return [(layer, [float(share) for share in mean[:, layer]]) for layer in range(content.depth)]


def _shown(content: Content) -> dict[str, Any]:
    shown, start = content.shown, content.start
    layout, stay = shown.trace.layout, survivors(shown, start)
    return {
        "clip": shown.clip,
        "question": shown.question,
        "duration": shown.look.duration,
        "frames": [
            {
                "uri": _uri(shown, picture.index),
                "second": picture.second,
                "stay": picture.stay,
                "there": picture.there,
                "share": picture.stay / picture.there,
            }
            for picture in pictures(shown, start)
        ],
        "seen": tokens(layout, [Modality.VIDEO, Modality.IMAGE], stay),
        "heard": tokens(layout, [Modality.AUDIO], stay),
        "timed": any(True for _ in stretches(shown, start)),
        "width": shown.look.frames.shape[2],
        "height": shown.look.frames.shape[1],
    }


def _uri(shown: Record, index: int) -> str:
    file = BytesIO()
    Image.fromarray(shown.look.frames[index]).save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _layers(content: Content) -> dict[str, Any]:
    """Tokens by modality of ranges of like layers."""
    present = [m.label for m in Modality if any(layer.get(m.label) for layer in content.unpruned.layers)]
    rows: list[tuple[int, int, list[int]]] = []
    for layer, counts in enumerate(content.pruned.layers):
        row = [counts.get(label, 0) for label in present]
        if rows and rows[-1][2] == row:
            rows[-1] = (rows[-1][0], layer, row)
        else:
            rows.append((layer, layer, row))
    return {"heads": present, "rows": [(f"{a}" if a == b else f"{a}-{b}", row) for a, b, row in rows]}


def _costs(content: Content) -> list[tuple[str, float]]:
    return [
        ("Prefill FLOPs, mean over prompts", content.flops),
        ("Prefill FLOPs, this prompt", content.pruned.flops),
        ("KV cache, mean over prompts", content.kv),
        ("KV cache, this prompt", content.pruned.kv),
    ]
