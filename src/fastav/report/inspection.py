"""An inspection as JSON: its tokens and cuts, with small pictures of the frames and outlines of the sounds."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from fastav.inspection import Cut, Inspection
from fastav.layout import Layout, Modality
from fastav.media import AudioTrack, VideoTrack
from fastav.messages import Kind, Media
from fastav.request import Request

SCHEMA = 1
MAX_FRAMES, WIDTH, QUALITY = 64, 320, 72  # pictures of an item, their width in pixels, JPEG's quality
WAVEFORM_BINS, RATE = 800, 16_000


def to_json(
    inspection: Inspection,
    request: Request,
    *,
    pictures: bool = True,
    items: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """An inspection as a JSON object, for `fastav run --report` and `POST /v1/inspect` (docs/inspect.md).

    request: the one that was inspected. Its clips are decoded again for pictures of the frames that tokens show, at
    most 64 of an item, evenly spread; then the others have no `uri`, and the item's `frames_shown` is the number of
    pictures. pictures: without them, no media are decoded, no frame has a `uri` and no sound a `waveform`. items: what
    `items_json` gave for this request, if it has been called.
    Raises: UnreadableMedia for clips that cannot be decoded any more.
    """
    items = items_json(request, inspection.layout, pictures=pictures) if items is None else items
    return tokens_and_cuts(inspection) | {"question": request.question, "items": list(items)}


def tokens_and_cuts(inspection: Inspection) -> dict[str, Any]:
    """What is known of an inspection without its request: all of its JSON object but `question` and `items`."""
    layout = inspection.layout
    return {
        "schema": SCHEMA,
        "model": inspection.model,
        "plan": inspection.plan.name or inspection.plan.fingerprint,
        "plan_json": json.loads(inspection.plan.to_json()),
        "layers": inspection.depth,
        "modalities": [modality.label for modality in Modality],
        "tokens": {
            "modality": layout.modality.tolist(),
            "item": layout.item.tolist(),
            "frame": _frames(layout).tolist(),
            "second": [_number(second, 4) for second in layout.second.tolist()],
            "box": [None if np.isnan(box).any() else [round(edge, 5) for edge in box.tolist()] for box in layout.box],
            "padding": layout.padding.astype(int).tolist(),
            "text": list(inspection.texts),
            "layers": inspection.layers.tolist(),
        },
        "cuts": [_cut(cut) for cut in inspection.cuts],
        "flops": inspection.flops.to_dict(),
        "kv_bytes": inspection.kv_bytes.to_dict(),
    }


def items_json(request: Request, layout: Layout, *, pictures: bool = True) -> list[dict[str, Any]]:
    """The media of a prompt as JSON objects.  layout: of the prompt. Arguments and errors: as for `to_json`."""
    frame = _frames(layout)
    return [
        _item(media, frame[layout.item == index], layout.second[layout.item == index], pictures=pictures)
        for index, media in enumerate(request.media)
    ]


def _number(value: float, digits: int) -> float | None:
    return round(value, digits) if np.isfinite(value) else None


def _frames(layout: Layout) -> Int[np.ndarray, " tokens"]:
    """The frame that each token shows; 0 for pictures, which may have none in a layout, and -1 for sound."""
    is_visual = np.isin(layout.modality, (Modality.VIDEO, Modality.IMAGE))
    unnumbered = (layout.modality == Modality.IMAGE) & (layout.frame < 0)
    return np.where(is_visual, np.where(unnumbered, 0, layout.frame), -1)


def _cut(cut: Cut) -> dict[str, Any]:
    return {
        "layer": cut.layer,
        "method": cut.method,
        "cache_only": cut.is_cache_only,
        "token": cut.tokens.tolist(),
        "score": [float(f"{score:.6g}") if np.isfinite(score) else None for score in cut.scores.tolist()],
        "kept": cut.kept.astype(int).tolist(),
    }


def _item(
    media: Media, frame: Int[np.ndarray, " tokens"], second: Float[np.ndarray, " tokens"], *, pictures: bool
) -> dict[str, Any]:
    """A medium of the prompt.  frame, second: of its tokens."""
    has_video, has_audio = media.tracks
    numbers = np.unique(frame[frame >= 0])
    moments = {int(n): float(np.nanmin(s)) if np.isfinite(s := second[frame == n]).any() else None for n in numbers}
    if media.kind is Kind.IMAGE:
        moments = dict.fromkeys(moments, 0.0)
    shown = numbers[np.linspace(0, len(numbers) - 1, min(MAX_FRAMES, len(numbers))).round().astype(int)]
    track = media.clip.require_video() if has_video else None
    item: dict[str, Any] = {
        "kind": str(media.kind if has_video else Kind.AUDIO),
        "name": media.clip.name,
        "seconds": _number(media.seconds, 4),
        "frames": [] if track is None else _pictures(track, moments, shown.tolist() if pictures else []),
        "waveform": waveform(media.clip.require_audio()) if has_audio and pictures else None,
    }
    if pictures and len(shown) < len(numbers):
        item["frames_shown"] = len(shown)
    return item


def _pictures(track: VideoTrack, moments: Mapping[int, float | None], shown: list[int]) -> list[dict[str, Any]]:
    """The frames at these moments, by number.  shown: those to have a picture, unless their time is unknown."""
    width = min(WIDTH, track.width)
    height = max(1, round(track.height * width / track.width))
    uris = dict(_uris(track, {number: moments[number] for number in shown}, (width, height)))
    return [
        {
            "frame": number,
            "second": None if moment is None else round(moment, 4),
            "width": width,
            "height": height,
            "uri": uris.get(number),
        }
        for number, moment in moments.items()
    ]


def _uris(track: VideoTrack, moments: Mapping[int, float | None], size: tuple[int, int]) -> Iterator[tuple[int, str]]:
    """Frames as small JPEGs, decoded one at a time."""
    known = sorted((moment, number) for number, moment in moments.items() if moment is not None)
    if not known:
        return
    seconds = track.seconds(range(track.frames))
    nearest = [int(np.abs(seconds - moment).argmin()) for moment, _ in known]
    for (_, number), picture in zip(known, track.each(nearest), strict=True):
        yield number, jpeg(picture, size)


def jpeg(picture: np.ndarray, size: tuple[int, int]) -> str:
    """A picture uint8 [height, width, 3] as the data URI of a JPEG of this width and height."""
    target = BytesIO()
    Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS).save(target, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(target.getvalue()).decode()}"


def waveform(track: AudioTrack) -> dict[str, Any]:
    """The outline of a sound: the lowest and highest sample of equal parts, at most 800."""
    sound = np.asarray(track.read(RATE))
    ends = np.linspace(0, len(sound), min(WAVEFORM_BINS, len(sound)) + 1).astype(int)
    parts = [sound[start:end] for start, end in pairwise(ends)]
    low, high = ([round(float(pick(part).clip(-1, 1)), 3) for part in parts] for pick in (np.min, np.max))
    return {"start": round(track.start, 4), "seconds": round(len(sound) / RATE, 4), "low": low, "high": high}
