"""The prompt that a calibration's report shows, as an inspection: from its record, without the model and the clip."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastav.flops import Saving
from fastav.inspection import Cut, Inspection
from fastav.layout import MEDIA, Modality
from fastav.report.content import LAST, Content, frame_tokens
from fastav.report.inspection import jpeg, tokens_and_cuts

MEASURED = "last-query"  # the method whose scores are the attention that a trace holds


def example_inspection(content: Content) -> dict[str, Any] | None:
    """The example of a calibration for the viewer of inspections; None if its record does not know boxes.

    It differs from an inspection of the model: the text of tokens is unknown, frames are those of the preview, and
    scores are known of cuts by `last-query` alone, from the trace.
    """
    record = content.example
    layout = record.trace.layout
    if np.isnan(layout.box).all():
        return None
    inspection = Inspection(
        model=content.head["model"],
        plan=content.plan,
        depth=content.depth,
        layout=layout,
        cuts=tuple(_cuts(content)),
        texts=["…" if modality == Modality.TEXT else None for modality in layout.modality],
        flops=Saving(1, 1),
        kv_bytes=Saving(1, 1),
    )
    data = tokens_and_cuts(inspection)
    return data | {"question": record.question, "items": [_item(content)], "flops": None, "kv_bytes": None}


def _cuts(content: Content) -> Iterator[Cut]:
    trace = content.example.trace
    methods = {layer: step.method for layer, step in content.plan.cuts(content.depth)}
    remaining = np.flatnonzero(np.isin(trace.layout.modality, MEDIA))
    for layer, selected in trace.selections:
        is_measured = methods[layer] == MEASURED and layer > 0
        attention = trace.attention[LAST, layer - 1, remaining]
        kept = np.isin(remaining, selected)
        yield Cut(
            layer=layer,
            method=methods[layer],
            is_cache_only=False,
            tokens=remaining,
            scores=attention if is_measured else np.full(len(remaining), np.nan),
            kept=kept,
        )
        remaining = remaining[kept]


def _item(content: Content) -> dict[str, Any]:
    record = content.example
    layout, preview = record.trace.layout, record.preview
    _, height, width, _ = preview.frames.shape
    pictured = {float(np.float32(shown.second)): shown.index for shown in frame_tokens(record, content.start)}
    is_placed, frames = ~np.isnan(layout.box[:, 0]) & np.isfinite(layout.second), []
    for number, first in zip(*np.unique(layout.frame[is_placed], return_index=True), strict=True):
        second = float(layout.second[is_placed][first])
        index = pictured.get(second)
        frames.append(
            {
                "frame": max(0, int(number)),
                "second": round(second, 4),
                "width": width,
                "height": height,
                "uri": None if index is None else jpeg(preview.frames[index], (width, height)),
            }
        )
    low, high = ([round(float(value), 3) for value in peaks.clip(-1, 1)] for peaks in preview.peaks)
    wave = {"start": 0.0, "seconds": round(float(preview.duration), 4), "low": low, "high": high}
    return {
        "kind": "video" if frames else "audio",
        "name": record.clip,
        "seconds": round(float(preview.duration), 4),
        "frames": frames,
        "waveform": wave if low else None,
    }
