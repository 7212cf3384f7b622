"""Clips as they come, in every family: frames a few pixels high, tracks that do not start together, no question."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from fastav.errors import FastAVError, MediaError
from fastav.layout import Modality
from fastav.media import Clip
from fastav.request import Request, Use
from media_files import tone
from support.family import NAMES, family_of

RATE = 16_000
SIZES = (1, 3, 30)  # pixels a side, of which processors could take the first two for channels
BY_TIME = (
    "qwen2_5_omni",
    "qwen3_omni",
    "gemma4",
    "gemma4_bidirectional",
)  # put video and sound together by their times, or tell them


@cache
def family(name: str) -> tuple[Any, Any]:
    one = family_of(name)
    return one.processor, one.adapter


def values(name: str, height: int, width: int) -> set[float]:
    """All values of pixels that a family makes of a clip in one color."""
    processor, adapter = family(name)
    frames = np.full((4, height, width, 3), (250, 120, 10), np.uint8)
    request = Request(clip=Clip.from_arrays(frames=frames, fps=2.0), question="What?", use=Use.VIDEO)
    inputs = adapter.prepare(processor, [request]).inputs
    pixels = next(inputs[key] for key in inputs if "pixel" in key and "mask" not in key and "position" not in key)
    return {round(float(v), 3) for v in pixels.unique()}


@pytest.mark.parametrize("size", SIZES[:2])
@pytest.mark.parametrize("name", NAMES)
def test_frames_a_few_pixels_high_or_wide_keep_their_color(name: str, size: int) -> None:
    right = values(name, SIZES[2], 60)
    # white or black fills up what a family wants larger
    long = 6 if name == "phi4_multimodal" else 60  # it refuses what is longer
    assert values(name, size, long) <= right | {-1.0, 0.0, 1.0}
    assert values(name, long, size) <= right | {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("qwen")])
def test_a_clip_that_a_processor_does_not_take_is_refused(name: str) -> None:
    processor, adapter = family(name)
    clip = Clip.from_arrays(frames=np.zeros((4, 16, 4000, 3), np.uint8), fps=2.0, name="banner")
    with pytest.raises(MediaError, match="cannot process banner") as caught:
        adapter.prepare(processor, [Request(clip=clip, question="What?", use=Use.VIDEO)])
    assert isinstance(caught.value.__cause__, ValueError)


def late(*, video: float = 0.0, audio: float = 0.0) -> Clip:
    """A clip of 4 s whose tracks start at these seconds."""
    frames = np.zeros((40, 56, 56, 3), np.uint8)
    clip = Clip.from_arrays(frames=frames, fps=10.0, waveform=tone(4, RATE), sample_rate=RATE)
    assert clip.video is not None
    assert clip.audio is not None
    shown = replace(clip.video, start=video, source=Later(clip.video.source, video))
    return replace(clip, video=shown, audio=replace(clip.audio, start=audio))


class Later:
    """The frames of a track, shown later."""

    def __init__(self, source: Any, start: float) -> None:
        self.pick = source.pick
        self.seconds = lambda wanted: source.seconds(wanted) + start


def seconds(name: str, clip: Clip, use: Use, *modalities: Modality) -> np.ndarray:
    processor, adapter = family(name)
    (layout,) = adapter.prepare(processor, [Request(clip=clip, question="What?", use=use)]).layouts
    return layout.second[np.isin(layout.modality, modalities)]


@pytest.mark.parametrize("name", NAMES)
def test_layouts_tell_true_seconds_of_tracks_that_start_late(name: str) -> None:
    _, adapter = family(name)
    seen = (Modality.VIDEO, Modality.IMAGE)
    use = Use.BOTH if adapter.supports_audio else Use.VIDEO
    found = seconds(name, late(video=2.0), use, *seen)
    held = use is Use.BOTH and name in BY_TIME
    assert np.nanmin(found) == pytest.approx(0.0 if held else 2.0, abs=0.6)
    assert np.nanmax(found) <= 6.0
    if adapter.supports_audio:
        found = seconds(name, late(audio=2.0), Use.BOTH, Modality.AUDIO)
        assert np.nanmin(found) == pytest.approx(0.0 if name in BY_TIME else 2.0, abs=0.1)
        if name in BY_TIME:  # silence comes first, so there is more to hear
            assert len(found) > len(seconds(name, late(), Use.BOTH, Modality.AUDIO))


@pytest.mark.parametrize("name", NAMES)
def test_sound_alone_that_starts_late_knows_when(name: str) -> None:
    processor, adapter = family(name)
    request = Request(clip=late(audio=2.0), question="What?", use=Use.AUDIO)
    try:
        (layout,) = adapter.prepare(processor, [request]).layouts
    except MediaError:
        return  # a family that does not hear, or not without a picture
    assert np.nanmin(layout.second[layout.modality == Modality.AUDIO]) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("question", ["", " \n\t"])
def test_an_empty_question_is_refused(question: str) -> None:
    with pytest.raises(FastAVError, match="the question is empty"):
        Request(clip=late(), question=question)
