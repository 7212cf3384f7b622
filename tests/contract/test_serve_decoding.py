"""What a decoding process prepares, and what its replayed clips give again, is what files give, to the bit.

For every family that transformers has, and for our own. The process's own code runs in this process here.
"""

import importlib
import pkgutil
import re
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastav
from fastav.adapter import ModelAdapter, Prepared, adapter_for
from fastav.errors import MediaError
from fastav.request import Request
from fastav.serve._recording import UnrecordedRead
from media_files import tone, write_clip
from support import families, native
from support.decoding import first_frame_and_times, here

OFFICIAL = sorted(m.name for m in pkgutil.iter_modules(families.__path__) if not m.name.startswith("_"))
OWN = ("videollama2", "video_salmonn2", "video_salmonn2_plus")
NAMES = (*OFFICIAL, *OWN, "tiny-long")
RATE = 16_000


@cache
def family(name: str) -> tuple[ModelAdapter, Any]:
    """The adapter and the processor of a family."""
    if name in OFFICIAL:
        model, processor = importlib.import_module(f"support.families.{name}").build("sdpa")
        return adapter_for([type(model).__name__]), processor
    if name in OWN:
        one = getattr(native, name.upper())
        return one.adapter, one.processor()
    engine = fastav.pipeline(name).engine
    return engine.adapter, engine.processor


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a few seconds, by what they are."""
    folder = tmp_path_factory.mktemp("media")
    fast = {"frames": 12, "fps": 4, "size": (64, 32), "options": {"g": "4"}}
    films = {
        "film": write_clip(folder / "film.mp4", **fast, audio="aac", sound=tone(3, RATE), rate=RATE),
        "stereo": write_clip(
            folder / "s.mkv", **fast, audio="flac", sound=tone(3, 44_100, 2), rate=44_100, layout="stereo"
        ),
        "silent": write_clip(folder / "silent.mp4", **fast),
        "sound": write_clip(folder / "sound.wav", None, audio="pcm_s16le", sound=tone(3, RATE), rate=RATE),
    }
    found = {name: path.read_bytes() for name, path in films.items()}
    found["delayed"] = _delayed(folder / "delayed.mkv")
    found["image"] = _png(64, 32)
    return found


def _png(width: int, height: int) -> bytes:
    buffer = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def _delayed(path: Path) -> bytes:
    """A clip whose sound starts 1.5 s late."""
    from unit.test_media_starts import with_offset

    return with_offset(path, audio=1.5).read_bytes()


def _messages(*parts: tuple[str, bytes]) -> list[dict[str, Any]]:
    content = [{"type": kind, kind: data} for kind, data in parts]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What is shown?"}]}]


CASES = {
    "a film": [("video", "film")],
    "stereo": [("video", "stereo")],
    "no sound": [("video", "silent")],
    "sound alone": [("audio", "sound")],
    "late sound": [("video", "delayed")],
    "an image": [("image", "image")],
    "two films": [("video", "film"), ("video", "stereo")],
    "a film and another sound": [("video", "silent"), ("audio", "sound")],
    "no media": [],
}


@pytest.mark.filterwarnings("ignore::fastav.errors.FastAVWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_process_prepares_what_the_file_gives(name: str, case: str, media: dict[str, bytes]) -> None:
    adapter, processor = family(name)
    messages = _messages(*((kind, media[what]) for kind, what in CASES[case]))
    try:
        direct = adapter.prepare(processor, [Request(messages=messages)])
    except MediaError as error:  # a family that takes no such medium says the same from there
        with pytest.raises(type(error), match=re.escape(str(error))):
            here(adapter, processor, messages)
        return
    decoded = here(adapter, processor, messages, also=first_frame_and_times)
    _assert_same(decoded.prepared, direct)
    _assert_same(adapter.prepare(processor, [decoded.request]), direct)
    again = first_frame_and_times(decoded.request, decoded.prepared)
    np.testing.assert_equal(again, decoded.also)
    np.testing.assert_equal(decoded.also, first_frame_and_times(Request(messages=messages), direct))


@pytest.mark.filterwarnings("ignore::fastav.errors.FastAVWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_replayed_requests_is_that_of_the_files(name: str, media: dict[str, bytes]) -> None:
    adapter, processor = family(name)
    talks = [_messages(("video", media[which])) for which in ("film", "stereo")]
    direct = adapter.prepare(processor, [Request(messages=talk) for talk in talks])
    replayed = adapter.prepare(processor, [here(adapter, processor, talk).request for talk in talks])
    _assert_same(replayed, direct)


@pytest.mark.filterwarnings("ignore::fastav.errors.FastAVWarning")
def test_what_was_not_read_is_an_error_of_ours(media: dict[str, bytes]) -> None:
    adapter, processor = family("tiny-long")
    clip = here(adapter, processor, _messages(("video", media["film"]))).request.media[0].clip
    video, audio = clip.require_video(), clip.require_audio()
    for read in (
        lambda: audio.read(12_345),
        lambda: audio.native(),
        lambda: audio.length(12_345),
        lambda: list(audio.source.frames()),
        lambda: list(audio.source.window(0, 1)),
    ):
        with pytest.raises(UnrecordedRead, match="the clip"):
            read()
    without = here(adapter, processor, _messages(("video", media["film"])), replay=False)
    shown = without.request.media[0].clip.require_video()
    assert (shown.frames, shown.width, shown.height) == (video.frames, 64, 32)
    with pytest.raises(UnrecordedRead, match="frame 0 of the clip"):
        shown.read([0])
    with pytest.raises(UnrecordedRead, match="frame 0 of the clip"):
        next(shown.each([0]))


def _assert_same(one: Prepared, other: Prepared) -> None:
    """Inputs and layouts are equal to the bit."""
    assert list(one.inputs) == list(other.inputs)
    for name, value in other.inputs.items():
        if isinstance(value, torch.Tensor):
            assert one.inputs[name].dtype == value.dtype
            assert torch.equal(one.inputs[name], value), name
        else:
            np.testing.assert_equal(one.inputs[name], value)
            assert type(one.inputs[name]) is type(value), name
    for ours, theirs in zip(one.layouts, other.layouts, strict=True):
        for field in type(theirs).__slots__:
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=field)
            assert getattr(ours, field).dtype == getattr(theirs, field).dtype
