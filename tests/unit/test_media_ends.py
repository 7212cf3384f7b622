"""A track ends where its data end, whatever headers say; what is missing is told."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

import fastav.media
from fastav.media import Clip, MediaWarning
from media_files import numbered, numbers, tone, write_clip


@pytest.fixture
def soon_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files over 20 s are treated as those over 10 minutes."""
    for module in (fastav.media.audio, fastav.media.video):
        monkeypatch.setattr(module, "MAX_SCAN_SECONDS", 20.0)


def with_gaps(path: Path, *, frames: int, fps: int, codec: str = "mjpeg", pixels: str = "yuvj420p") -> list[int]:
    """A film of which two of three frames are left out, for which AVI has empty chunks; the numbers of the others."""
    there = [number for number in range(frames) if number % 3 == 0]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"bf": "0"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = 128, 64, pixels
        for number in there:
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return there


@pytest.mark.usefixtures("soon_long")
@pytest.mark.parametrize(("frames", "fps"), [(60, 10), (60, 2)])
@pytest.mark.parametrize("codec", ["mjpeg", "mpeg4", "libx264"])
def test_empty_chunks_of_an_avi_are_no_frames(codec: str, frames: int, fps: int, tmp_path: Path) -> None:
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    there = with_gaps(tmp_path / "a.avi", frames=frames, fps=fps, codec=codec, pixels=pixels)
    track = Clip.open(tmp_path / "a.avi").require_video()
    assert track.frames == len(there)
    picked = [0, 1, len(there) // 2, len(there) - 1]
    assert numbers(track.read(picked)) == [there[i] for i in picked]
    np.testing.assert_allclose(track.seconds(picked), [there[i] / fps for i in picked])
    assert track.start == 0


def test_h264_in_an_avi_is_shown_when_its_chunks_say(tmp_path: Path) -> None:
    video = Clip.open(write_clip(tmp_path / "a.avi", options={"bf": "0"})).require_video()
    assert (video.frames, video.fps, video.duration, video.start) == (40, 10, 4, 0)
    np.testing.assert_allclose(video.seconds(range(40)), np.arange(40) / 10)
    assert numbers(video.read([0, 1, 39])) == [0, 1, 39]


def test_h264_in_an_avi_starts_with_its_sound(tmp_path: Path) -> None:
    clip = Clip.open(write_clip(tmp_path / "a.avi", options={"bf": "0"}, audio="libmp3lame", sound=tone(4, 16_000)))
    assert (clip.require_video().start, clip.require_audio().start) == (0, 0)


@pytest.mark.usefixtures("soon_long")
@pytest.mark.parametrize("name", ["a.flv", "a.avi", "a.mkv"])
@pytest.mark.parametrize(("seen", "heard"), [(30, 60), (60, 30)])
def test_the_longer_track_does_not_lengthen_the_other(name: str, seen: int, heard: int, tmp_path: Path) -> None:
    sound = np.tile(tone(10, 11_025), heard // 10)
    codec = "mpeg4" if name == "a.avi" else "libx264"
    options = {"g": "20"} if name == "a.avi" else {"g": "20", "preset": "ultrafast"}
    path = tmp_path / name
    write_clip(path, codec, frames=seen, fps=1, options=options, audio="libmp3lame", sound=sound, rate=11_025)
    clip = Clip.open(path)
    video, audio = clip.require_video(), clip.require_audio()
    assert video.frames == seen
    assert video.duration == pytest.approx(seen, abs=1.1)
    assert audio.duration == pytest.approx(heard, abs=0.5)
    picked = [0, 1, seen - 2, seen - 1]
    assert numbers(video.read(picked)) == picked


@pytest.mark.usefixtures("soon_long")
@pytest.mark.parametrize(
    ("name", "codec", "rate"), [("a.ac3", "ac3", 44_100), ("a.mpg", "ac3", 48_000), ("a.mkv", "ac3", 44_100)]
)
def test_sound_does_not_drift(name: str, codec: str, rate: int, tmp_path: Path) -> None:
    path = write_clip(tmp_path / name, None, audio=codec, sound=tone(60, rate), rate=rate)
    track = Clip.open(path).require_audio()
    assert track.duration == pytest.approx(60, abs=0.1)
    whole = track.read(16_000)
    for start in (0, 16_000 * 33 + 7, 16_000 * 58):
        part = track.read(16_000, [(start, start + 16_000)])[0]
        assert np.abs(part - whole[start : start + 16_000]).max() * 32768 <= 4


@pytest.mark.usefixtures("soon_long")
def test_raw_aac_lasts_as_long_as_its_packets(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.aac", None, audio="aac", sound=tone(60, 16_000), rate=16_000)
    assert Clip.open(path).require_audio().duration == pytest.approx(60, abs=0.2)


@pytest.mark.parametrize(
    ("name", "audio", "muxer"),
    [("a.wav", "pcm_s16le", {}), ("a.m4a", "aac", {"movflags": "faststart"}), ("a.flac", "flac", {})],
)
def test_sound_that_is_cut_short_is_told(name: str, audio: str, muxer: dict, tmp_path: Path) -> None:
    path = write_clip(tmp_path / name, None, audio=audio, sound=tone(20, 16_000), muxer=muxer)
    assert Clip.open(path).require_audio().duration == pytest.approx(20, abs=0.1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    told = "has 38. of 640 kB" if name == "a.wav" else r"ends at 1\d\.\d s, but the file says 20\.0 s"
    with pytest.warns(MediaWarning, match=f"{name} {told}"):
        track = Clip.open(path).require_audio()
    assert track.duration == pytest.approx(12, abs=1.5)
    assert len(track.read(16_000)) == pytest.approx(track.samples, abs=4096)


def test_a_film_whose_header_promises_more_is_told(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", "mpeg4", frames=100, audio="libmp3lame", sound=tone(10, 16_000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(MediaWarning, match=r"a\.avi has \d+ of \d+ kB: it is cut short"):
        clip = Clip.open(path)
    frames = clip.require_video().frames
    assert 20 < frames < 80
    assert numbers(clip.require_video().read(range(frames))) == list(range(frames))
