"""In a file of hours, only what is asked for is read; frames and sound are still the right ones."""

import time
from pathlib import Path

import numpy as np
import pytest

from fastav.errors import UnreadableMedia
from fastav.media import Clip
from fastav.media._frames import ScannedFrames, SeekedFrames
from media_files import numbers, tone, write_clip

SECONDS = 2 * 3600
RATE = 8_000  # of recordings, in Hz
PICKED = [0, 899, 1800, 2700, 3600, 4500, 4501, 7199]
COUNTERS = Path("/proc/self/io")
OPTIONS = {"preset": "ultrafast", "bf": "2", "g": "20", "x264-params": "scenecut=0"}

KINDS = {
    "mp4": {"name": "long.mp4", "options": OPTIONS},
    "mp4 with open groups": {
        "name": "long.mp4",
        "options": {**OPTIONS, "bf": "3", "x264-params": "open-gop=1:scenecut=0:b-pyramid=strict"},
    },
    "mkv": {"name": "long.mkv", "options": OPTIONS},
    "avi": {"name": "long.avi", "codec": "mpeg4", "options": {"g": "20"}},
    "avi with H.264": {"name": "long.avi", "options": {**OPTIONS, "bf": "0"}},
    "ts": {"name": "long.ts", "options": OPTIONS},
}


def bytes_read() -> int:
    return int(COUNTERS.read_text().split()[1])


@pytest.fixture(params=KINDS, scope="module")
def film(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = dict(KINDS[request.param])
    return write_clip(tmp_path_factory.mktemp("long") / str(kind.pop("name")), frames=SECONDS, fps=1, **kind)


def test_frames_of_a_film_are_the_ones_asked_for(film: Path) -> None:
    track = Clip.open(film).require_video()
    assert isinstance(track.source, ScannedFrames if film.suffix == ".avi" else SeekedFrames)
    assert track.frames == SECONDS
    assert track.fps == pytest.approx(1)
    assert track.duration == pytest.approx(SECONDS, abs=1)
    assert numbers(track.read(PICKED)) == PICKED
    assert numbers(track.read(PICKED[::-1])) == PICKED[::-1]
    np.testing.assert_allclose(track.seconds(PICKED), PICKED, atol=0.01)


def test_every_frame_around_a_keyframe_is_found(film: Path) -> None:
    indices = list(range(3590, 3645))
    assert numbers(Clip.open(film).require_video().read(indices)) == indices


@pytest.mark.skipif(not COUNTERS.exists(), reason="counts bytes with Linux' /proc/self/io")
@pytest.mark.parametrize("name", ["long.mov", "long.mkv"])
def test_only_a_small_part_of_a_film_is_read(name: str, tmp_path: Path) -> None:
    sound = np.tile(tone(60, 4000), SECONDS // 60)
    path = tmp_path / name
    write_clip(path, frames=SECONDS, fps=1, options=OPTIONS, audio="pcm_u8", sound=sound, rate=4000)
    before, began = bytes_read(), time.perf_counter()
    clip = Clip.open(path)
    assert numbers(clip.require_video().read(PICKED)) == PICKED
    spans = [(k * 16_000, (k + 2) * 16_000) for k in range(100, SECONDS, 888)]
    sounds = clip.require_audio().read(16_000, spans)
    assert [len(s) for s in sounds] == [32_000] * 8
    assert time.perf_counter() - began < 10
    assert bytes_read() - before < path.stat().st_size / 5
    path.unlink()


@pytest.mark.filterwarnings("ignore::fastav.media.MediaWarning")
def test_a_film_that_ends_early_says_so(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mp4", frames=SECONDS, fps=1, options=OPTIONS, muxer={"movflags": "faststart"})
    data = whole.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: len(data) * 2 // 3])
    track = Clip.open(cut).require_video()
    assert numbers(track.read([0, 1000])) == [0, 1000]
    with pytest.raises(UnreadableMedia, match=r"frame 7000 of cut\.mp4 cannot be decoded"):
        track.read([7000])


SOUNDS = {
    "wav": ("long.wav", "pcm_mulaw"),
    "m4a": ("long.m4a", "aac"),
    "mka": ("long.mka", "pcm_s16le"),
    "mp3": ("long.mp3", "libmp3lame"),
}


@pytest.mark.parametrize("kind", SOUNDS)
def test_spans_of_a_long_recording_are_slices_of_the_whole(kind: str, tmp_path: Path) -> None:
    name, codec = SOUNDS[kind]
    path = write_clip(tmp_path / name, None, audio=codec, sound=np.tile(tone(60, RATE), 11), rate=RATE)
    track = Clip.open(path).require_audio()
    whole = track.read(16_000)
    starts = [0, 500, 16_000 * 5 + 3, 16_000 * 333 + 7, 16_000 * 659]
    spans = [(start, start + 32_000) for start in starts]
    for part, (start, end) in zip(track.read(16_000, spans), spans, strict=True):
        assert len(part) == len(whole[start:end])
        assert np.abs(part - whole[start:end]).max() * 32768 <= 2
    assert track.length(16_000) == pytest.approx(len(whole), abs=4000)
    assert track.read(16_000, [(16_000 * 800, 16_000 * 801)])[0].shape == (0,)
