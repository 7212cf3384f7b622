"""Every clip that cannot be used says what is wrong with it, and nothing reaches stderr."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

import fastav.media
from fastav.errors import MissingTrack, UnreadableMedia
from fastav.media import Clip
from media_files import numbers, tone, write_clip


def text(path: Path) -> Path:
    path.write_text("Not a film.\n" * 50)
    return path


def nothing(path: Path) -> Path:
    path.touch()
    return path


def noise(path: Path) -> Path:
    path.write_bytes(np.random.default_rng(0).bytes(20_000))
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def directory(path: Path) -> Path:
    path.mkdir()
    return path


def subtitles(path: Path) -> Path:
    path.write_text("1\n00:00:01,000 --> 00:00:02,000\nWords, no sound.\n")
    return path


def playlist(path: Path) -> Path:
    other = write_clip(path.parent / "other.ts", frames=10)
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other.name}\n#EXT-X-ENDLIST\n")
    return path


def without_index(path: Path) -> Path:
    data = write_clip(path).read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])
    return path


def without_frames(path: Path) -> Path:
    data = write_clip(path, muxer={"movflags": "faststart"}).read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 6])
    return path


def zeroed_frames(path: Path) -> Path:
    data = write_clip(path, muxer={"movflags": "faststart"}).read_bytes()
    start = data.index(b"mdat") + 4
    path.write_bytes(data[:start] + bytes(len(data) - start))
    return path


def absurdly_wide(path: Path) -> Path:
    return write_clip(path, "gif", frames=1, size=(16 * 2000, 2), pixels="rgb8")


BAD: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "missing": ("a.mp4", lambda path: path, "no such file"),
    "directory": ("a.mp4", directory, "is a directory"),
    "pipe": ("a.mp4", pipe, "not a regular file"),
    "name too long": ("a" * 300, lambda path: path, "cannot be opened: File name too long"),
    "name with a zero byte": ("a\0b", lambda path: path, "cannot be opened: .*embedded null"),
    "empty": ("a.mp4", nothing, r"is empty \(0 bytes\)"),
    "text": ("a.txt", text, "not a media file"),
    "text named mp4": ("a.mp4", text, "not a media file"),
    "noise": ("a.mkv", noise, "not a media file"),
    "subtitles": ("a.srt", subtitles, "neither video nor audio"),
    "playlist": ("a.m3u8", playlist, "not a media file|cannot be read"),
    "mp4 cut before its index": ("a.mp4", without_index, r"index \(moov\) is missing"),
    "mp4 cut before its frames": ("a.mp4", without_frames, "holds no frame that decodes"),
    "mp4 with zeroed frames": ("a.mp4", zeroed_frames, "holds no frame that decodes"),
    "too wide": ("a.gif", absurdly_wide, "frames of 32000 x 2; the limit is 16384"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_says_what_is_wrong(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, make, message = BAD[kind]
    path = make(tmp_path / name)
    capfd.readouterr()
    with pytest.raises(UnreadableMedia, match=message) as caught:
        Clip.open(path)
    assert caught.value.hint
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_says_so(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4")
    path.chmod(0)
    with pytest.raises(UnreadableMedia, match="Permission denied"):
        Clip.open(path)


def test_a_missing_track_is_named(tmp_path: Path) -> None:
    silent = Clip.open(write_clip(tmp_path / "a.mp4"))
    assert silent.audio is None
    with pytest.raises(MissingTrack, match=r"a\.mp4 has no audio track"):
        silent.require_audio()
    blind = Clip.open(write_clip(tmp_path / "a.wav", None, audio="pcm_s16le", sound=tone(1, 16_000)))
    assert blind.video is None
    with pytest.raises(MissingTrack, match=r"a\.wav has no video track"):
        blind.require_video()


@pytest.mark.filterwarnings("ignore::fastav.media.MediaWarning")
@pytest.mark.parametrize("tenths", [5, 6, 7, 8, 9])
@pytest.mark.parametrize(("name", "muxer"), [("a.mp4", {"movflags": "faststart"}), ("a.mkv", {}), ("a.ts", {})])
def test_a_file_cut_in_the_middle_gives_right_frames_or_an_error(
    name: str, muxer: dict, tenths: int, tmp_path: Path
) -> None:
    path = write_clip(tmp_path / name, frames=200, options={"g": "20", "bf": "3"}, muxer=muxer)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * tenths // 10])
    track = Clip.open(path).require_video()
    right = []
    # without a frame table, a cut may take a frame and leave a later one that was stored before it
    for index in range(track.frames if name == "a.mp4" else track.frames - 4):
        try:
            assert numbers(track.read([index])) == [index]
            right.append(index)
        except UnreadableMedia:
            continue
    assert right == list(range(len(right)))
    assert 20 < len(right) < 200


@pytest.mark.filterwarnings("ignore::fastav.media.MediaWarning")
def test_reading_past_the_cut_says_at_which_second_the_video_ends(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", frames=200, options={"g": "20"}, muxer={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    track = Clip.open(path).require_video()
    assert track.frames == 200
    with pytest.raises(UnreadableMedia, match=r"frame 199 of a\.mp4 cannot be decoded: its video ends at \d+\.\d\d s"):
        track.read([0, 199])


@pytest.mark.parametrize("name", ["", " "])
def test_a_clip_without_a_name_is_no_folder(name: str) -> None:
    with pytest.raises(UnreadableMedia, match="the path of the clip is empty"):
        Clip.open(name)


def test_a_file_that_goes_away_says_so(tmp_path: Path) -> None:
    clip = Clip.open(path := write_clip(tmp_path / "a.mp4", audio="aac", sound=tone(1, 16_000)))
    path.unlink()
    with pytest.raises(UnreadableMedia, match="no such file"):
        clip.require_video().read([0])
    with pytest.raises(UnreadableMedia, match="no such file"):
        clip.require_audio().read(16_000)


@pytest.mark.parametrize("name", ["with space.mp4", "ü 視.mp4", "100%d.mp4", "concat:a|b.mp4", "-.mp4"])
def test_odd_names_are_only_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_clip(tmp_path / "plain.mp4", frames=5)
    plain.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert numbers(Clip.open(name).require_video().read([4])) == [4]


def test_a_recording_that_begins_between_keyframes_counts_from_its_first_frame(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.ts", frames=60, options={"g": "20", "bf": "2"})
    data, packet = whole.read_bytes(), 188
    head = data[: 3 * packet]
    late = tmp_path / "late.ts"
    late.write_bytes(head + data[len(data) // 3 // packet * packet :])
    track = Clip.open(late).require_video()
    found = numbers(track.read(range(track.frames)))
    assert found == list(range(found[0], 60))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "frames or a waveform"),
        ({"frames": np.zeros((0, 4, 4, 3), np.uint8)}, r"uint8 \[frames, height, width, 3\], got uint8 \[0, 4, 4, 3\]"),
        ({"frames": np.zeros((1, 4, 4, 3), np.uint8), "fps": 0.0}, "fps must be positive"),
        ({"waveform": np.zeros(10)}, "needs its sample rate"),
        ({"waveform": np.zeros((2, 0)), "sample_rate": 16_000}, r"float \[channels, samples\], got float64 \[2, 0\]"),
    ],
)
def test_bad_arrays_say_what_is_wrong(arrays: dict, message: str) -> None:
    with pytest.raises(UnreadableMedia, match=message):
        Clip.from_arrays(**arrays)


def test_all_names_are_there_and_sorted() -> None:
    assert fastav.media.__all__ == sorted(fastav.media.__all__)
    assert all(hasattr(fastav.media, name) for name in fastav.media.__all__)
    assert av.logging.get_level() is None
