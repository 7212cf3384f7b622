"""Tracks that start late know it, and are shown where they belong."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from fastav.errors import UnreadableMedia
from fastav.media import Clip
from media_files import numbered, numbers, tone, write_clip

RATE = 16_000


def with_offset(path: Path, *, video: float = 0.0, audio: float = 0.0) -> Path:
    """2 s of numbered frames, 10 a second, and of a tone, which start at these seconds."""
    with av.open(str(path), "w") as container:
        seen = container.add_stream("libx264", rate=10, options={"g": "5", "bf": "0"})
        seen.width, seen.height, seen.pix_fmt = 128, 64, "yuv420p"
        heard = container.add_stream("flac" if path.suffix == ".mkv" else "aac", rate=RATE, layout="mono")
        packets = []
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = number + round(video * 10), Fraction(1, 10)
            packets += seen.encode(frame)
        packets += seen.encode(None)
        sound = (tone(2, RATE) * 32767).astype(np.int16)
        resampler = av.AudioResampler(format=heard.codec_context.format, layout="mono", rate=RATE)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, round(audio * RATE), Fraction(1, RATE)
        for one in [*resampler.resample(frame), *resampler.resample(None)]:
            packets += heard.encode(one)
        packets += heard.encode(None)
        for packet in sorted(packets, key=lambda p: float((p.dts or 0) * p.time_base)):
            container.mux(packet)
    return path


def loud_from(sound: np.ndarray) -> float:
    """When a sound begins, in seconds."""
    return float(np.flatnonzero(np.abs(sound) > 0.05)[0] / RATE)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_sound_that_starts_late(name: str, tmp_path: Path) -> None:
    clip = Clip.open(with_offset(tmp_path / name, audio=1.5))
    video, audio = clip.require_video(), clip.require_audio()
    assert video.start == 0
    assert audio.start == pytest.approx(1.5, abs=0.07)
    assert clip.duration == pytest.approx(3.5, abs=0.15)
    assert loud_from(audio.read(RATE)) < 0.07
    aligned = clip.aligned()
    sound = aligned.require_audio()
    assert sound.start == 0
    assert loud_from(sound.read(RATE)) == pytest.approx(1.5, abs=0.03)
    assert sound.duration == pytest.approx(audio.start + audio.duration, abs=1e-3)
    assert sound.length(RATE) == len(sound.read(RATE)) == len(audio.read(RATE)) + round(audio.start * RATE)
    assert loud_from(sound.native(0)) == pytest.approx(1.5, abs=0.03)
    whole = sound.read(RATE)
    for span in ((0, 100), (20_000, 26_000), (23_000, 30_000), (30_000, 40_000)):
        np.testing.assert_array_equal(sound.read(RATE, [span])[0], whole[slice(*span)])
    assert aligned.require_video() is video


def test_a_picture_that_comes_late_is_held(tmp_path: Path) -> None:
    clip = Clip.open(with_offset(tmp_path / "a.mkv", video=1.5))
    video, audio = clip.require_video(), clip.require_audio()
    assert (video.start, audio.start) == (pytest.approx(1.5, abs=0.01), 0)
    np.testing.assert_allclose(video.seconds([0, 19]), [1.5, 3.4], atol=0.01)
    shown = clip.aligned().require_video()
    assert (shown.frames, shown.start, shown.duration) == (35, 0, pytest.approx(3.5, abs=0.01))
    assert numbers(shown.read(range(35))) == [0] * 15 + list(range(20))
    assert numbers(shown.read([34, 3, 16, 3])) == [19, 0, 1, 0]
    assert numbers(np.stack(list(shown.each([0, 14, 15, 16, 16])))) == [0, 0, 0, 1, 1]
    np.testing.assert_allclose(shown.seconds(range(35)), np.arange(35) / 10, atol=0.01)
    assert loud_from(clip.aligned().require_audio().read(RATE)) < 0.07


def test_a_long_late_track_gives_the_spans_of_the_whole() -> None:
    waveform = tone(601, 4000)
    track = Clip.from_arrays(waveform=waveform, sample_rate=4000).require_audio()
    object.__setattr__(track, "start", 1.25)
    late = track.from_start()
    whole = late.read(4000)
    assert not whole[:5000].any()
    for span in ((0, 4000), (4000, 8000), (5000, 5001), (8000, 9000), (2_400_000, 2_404_000)):
        part = late.read(4000, [span])[0]
        assert len(part) == span[1] - span[0]
        assert np.abs(part - whole[slice(*span)]).max() <= 2 / 32768


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_tracks_that_start_together_are_left_alone(name: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / name, audio="aac", sound=tone(4, RATE), options={"bf": "0"})
    clip = Clip.open(path)
    assert clip.require_video().start == pytest.approx(0, abs=0.08)
    np.testing.assert_array_equal(clip.aligned().require_video().read([5]), clip.require_video().read([5]))


def test_tracks_that_are_hours_apart_are_refused(tmp_path: Path) -> None:
    clip = Clip.open(with_offset(tmp_path / "a.mkv", audio=1.5))
    object.__setattr__(clip.audio, "start", 1e6)
    with pytest.raises(UnreadableMedia, match="start 1000000 s apart"):
        clip.aligned()
