"""The report as one HTML page without external references."""

import base64
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastav.calibrate import KINDS, TOP, Record
from fastav.errors import InstallationError, install_hint
from fastav.layout import MEDIA, Modality
from fastav.report import formatting
from fastav.report.answer import embedded, read_text
from fastav.report.comparison import agreement_number, comparison_context
from fastav.report.content import (
    COLUMNS,
    LAST,
    Content,
    ModalityCut,
    audio_segments,
    curves,
    dropped_attention,
    frame_tokens,
    maps,
    modality_cuts,
    read,
    remaining_tokens,
    token_counts,
    tracks,
    weight_shares,
)
from fastav.report.example import example_inspection

try:
    from fastav.report import figures
    from fastav.report.rendering import Drawing, both_widths, render
except ImportError as error:
    raise InstallationError(f"a report needs {error.name}, which is not installed", install_hint("report")) from None


MOST_DROPPED = 0.5  # share of a modality's attention on dropped tokens, from which the report warns


def page(folder: str | Path) -> str:
    """The report of a finished calibration as HTML.

    folder: the folder of `fastav.calibrate.Calibration`; it is only read. Raises: CalibrationError if there is no
    finished calibration, or its files cannot be read; PlanError if its plan cannot be read.
    """
    content = read(Path(folder))
    return render("page.html", _context(content))


def _context(content: Content) -> dict[str, Any]:
    comparison = None if content.comparison is None else comparison_context(content.comparison, content.head)
    cuts = modality_cuts(content)
    cut_texts = {m: _cut_text(cut) for m, cut in cuts.items()}
    return {
        "model": content.head["model"],
        "source": content.head["source"],
        "depth": content.depth,
        "before": content.before,
        "start": content.start,
        "columns": COLUMNS,
        "top": TOP,
        "sentences": formatting.plan(content.plan, content.depth, content.evidence.present()),
        "numbers": list(_numbers(content)),
        "facts": list(_facts(content)),
        "small_print": _small_print(content),
        "plan": content.plan.to_json(),
        "longest": max(map(len, content.evidence.layouts)),
        "prompts": len(content.evidence.layouts),
        "is_prefix": all(cut.is_prefix for cut in cuts.values()),
        "weight_shares": _weight_rows(content),
        "warnings": list(_warnings(content)),
        "figures": _drawings(content, cuts, cut_texts),
        "concentration": _concentration(content),
        "example": _example(content),
        "viewer": _viewer(content),
        "layers": _layers(content),
        "costs": _costs(content, [] if comparison is None else comparison["ratios"]),
        "comparison": comparison,
        "unpruned": content.unpruned,
        "pruned": content.pruned,
        "failures": [(clip, count, reason) for (clip, reason), count in Counter(content.failures).items()],
    }


def _numbers(content: Content) -> Iterator[tuple[str, str, str]]:
    """The large numbers at the top: value, name, and explanation."""
    prompts, n_media = len(content.evidence.layouts), _mean_media(content)
    yield formatting.percent(content.flops), "prefill FLOPs", "of the unpruned model; mean over prompts"
    yield formatting.percent(content.kv), "KV cache", "of the unpruned model; mean over prompts"
    note = f"of {formatting.number(n_media)} audio and video tokens, after the cut; mean over prompts"
    yield formatting.number(content.tokens), "tokens stay", note
    if content.held is not None:
        yield (
            formatting.percent(content.held),
            "of the rollout stays",
            "of the rollout of audio and video at the cut",
        )
    if content.comparison is not None and (agreement := agreement_number(content.comparison)):
        yield agreement
    clips = content.origin.get("clips")
    yield (
        f"{prompts:,}",
        "prompts" if prompts != 1 else "prompt",
        f"on {formatting.plural(clips, 'clip')}" if clips else "",
    )


def _mean_media(content: Content) -> float:
    return float(np.mean([layout.count(*MEDIA) for layout in content.evidence.layouts]))


def _facts(content: Content) -> Iterator[tuple[str, str]]:
    criterion, rule = content.origin.get("criterion"), content.origin.get("rule")
    if criterion and rule in formatting.RULES:
        yield "Rule", formatting.rule(criterion["rule"], rule)
        yield "Budget", formatting.budget(criterion)
        yield "Cut", formatting.start(criterion["start"], content.start)
    yield "Decoder", f"{content.depth} layers of width {content.head['hidden']:,}"
    yield "Rollout", f"alpha = {content.head['alpha']:g}"


def _small_print(content: Content) -> list[tuple[str, str]]:
    origin = content.origin
    rows = [("Plan", content.plan.fingerprint)]
    if "date" in origin:
        rows.append(("Made", formatting.date(origin["date"])))
    rows.append(("Commit", origin.get("commit") or "unknown"))
    rows.append(("Machine", formatting.machine(origin.get("machine", {}), content.head)))
    rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in origin.get("versions", {}).items())))
    return rows


def _cut_text(cut: ModalityCut) -> str:
    """The effect of a cut as text: `the first 35 of 64 stay`; a range if it differs between prompts."""
    if not len(cut.remaining):
        return "the scores decide"
    total = _range(cut.total)
    if not cut.remaining.any():
        return f"none of {total} stay"
    if (cut.remaining >= cut.total).all():
        return f"all {total} stay"
    return f"{'the first ' if cut.is_prefix else ''}{_range(cut.remaining)} of {total} stay"


def _range(counts: np.ndarray) -> str:
    least, most = int(counts.min()), int(counts.max())
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def _weight_rows(content: Content) -> list[tuple[str, list[float]]]:
    """For each modality, its share of the weight of every kind."""
    shares = [weight_shares(content, kind) for kind in KINDS]
    return [(m.label, [share[m] for share in shares]) for m in content.evidence.present()]


def _warnings(content: Content) -> Iterator[str]:
    """A sentence on each modality most of whose attention is on tokens that the cut drops."""
    for m, share in dropped_attention(content).items():
        if share > MOST_DROPPED:
            yield (
                f"The cut at layer {content.start} drops the tokens with {formatting.percent(share)} of the attention "
                f"that the prompt's last token pays to {m.label} at layer {content.before}."
            )


def _drawings(
    content: Content, cuts: dict[Modality, ModalityCut], cut_texts: dict[Modality, str]
) -> dict[str, Drawing]:
    evidence, start, record = content.evidence, content.start, content.example
    longest = max(map(len, evidence.layouts))
    summary = "; ".join(f"{m.label}: {text}" for m, text in cut_texts.items())
    drawings = {
        "heat": both_widths(
            f"Two heat maps, {content.depth} layers by {longest:,} positions, of attention and of rollout of the last "
            f"query, and below them which modality stands where. A dashed line before layer {start} marks the cut. "
            "The table that follows has the shares of the modalities.",
            figures.heat,
            maps(evidence),
            tracks(evidence),
            longest,
            start,
        ),
        "concentration": both_widths(
            f"Lines by layer of the share that the heaviest {TOP:.0%} of the audio and video tokens have, for "
            "attention and for rollout. The table that follows has the numbers.",
            figures.concentration,
            *_concentration_by_layer(content),
            start,
        ),
        "layers": both_widths(
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
            drawings[axis] = both_widths(
                f"Curves of the mean attention and the mean rollout of a token by {axis}, with a band of one standard "
                f"deviation over prompts; what goes at the cut is hatched. {summary}.",
                figures.curves,
                data,
                cuts,
                cut_texts,
                seconds=axis == "second",
            )
    if record.preview.peaks.shape[1]:
        remaining, total = token_counts(record.trace.layout, [Modality.AUDIO], remaining_tokens(record, start))
        drawings["waveform"] = both_widths(
            f"Waveform of the clip, {record.preview.duration:.1f} s. {remaining:,} of {total:,} audio tokens stay.",
            figures.waveform,
            record.preview.peaks,
            record.preview.duration,
            list(audio_segments(record, start)),
        )
    return drawings


def _concentration_by_layer(content: Content) -> tuple[np.ndarray, np.ndarray]:
    moments = content.evidence.concentration
    return moments.mean[:, LAST, :, 0], moments.spread[:, LAST, :, 0]


def _concentration(content: Content) -> list[tuple[int, list[float]]]:
    mean, _ = _concentration_by_layer(content)
    return [(layer, [float(share) for share in mean[:, layer]]) for layer in range(content.depth)]


def _example(content: Content) -> dict[str, Any]:
    record, start = content.example, content.start
    layout, mask = record.trace.layout, remaining_tokens(record, start)
    return {
        "clip": record.clip,
        "question": record.question,
        "duration": record.preview.duration,
        "frames": [
            {
                "uri": _data_uri(record, frame.index),
                "second": frame.second,
                "remaining": frame.remaining,
                "total": frame.total,
                "share": frame.remaining / frame.total,
            }
            for frame in frame_tokens(record, start)
        ],
        "visual": token_counts(layout, [Modality.VIDEO, Modality.IMAGE], mask),
        "audio": token_counts(layout, [Modality.AUDIO], mask),
        "has_times": any(True for _ in audio_segments(record, start)),
        "width": record.preview.frames.shape[2],
        "height": record.preview.frames.shape[1],
    }


def _viewer(content: Content) -> dict[str, str] | None:
    """The files and the data of the viewer of the example; None if its record does not know boxes."""
    data = example_inspection(content)
    if data is None:
        return None
    return {"css": read_text("viewer.css"), "js": read_text("viewer.js"), "data": embedded(data)}


def _data_uri(record: Record, index: int) -> str:
    file = BytesIO()
    Image.fromarray(record.preview.frames[index]).save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _layers(content: Content) -> dict[str, Any]:
    """Tokens by modality, with consecutive equal layers joined."""
    present = [m.label for m in Modality if any(layer.get(m.label) for layer in content.unpruned.layers)]
    rows: list[tuple[int, int, list[int]]] = []
    for layer, counts in enumerate(content.pruned.layers):
        row = [counts.get(label, 0) for label in present]
        if rows and rows[-1][2] == row:
            rows[-1] = (rows[-1][0], layer, row)
        else:
            rows.append((layer, layer, row))
    return {"heads": present, "rows": [(f"{a}" if a == b else f"{a}-{b}", row) for a, b, row in rows]}


def _costs(content: Content, measured: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Names and shares of the unpruned model's costs.  measured: those of time."""
    return [
        ("Prefill FLOPs, mean over prompts", content.flops),
        ("KV cache, mean over prompts", content.kv),
        *measured,
        ("Prefill FLOPs, this prompt", content.pruned.flops),
        ("KV cache, this prompt", content.pruned.kv),
    ]
