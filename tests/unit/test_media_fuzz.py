"""Whatever is done to a file, it opens as a clip that can be read, or says in words that it cannot, soon."""

import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastav.errors import MediaError
from fastav.media import Clip
from media_files import tone, write_clip

CASES = Path(__file__).parents[1] / "cases"
ROUNDS = 12
SECONDS = 20.0  # for one file; far more than any takes
FILMS = {
    "a.mp4": ("libx264", "aac", 16_000),
    "a.mkv": ("libx264", "aac", 16_000),
    "a.avi": ("mpeg4", "libmp3lame", 16_000),
    "a.flv": ("libx264", "libmp3lame", 44_100),
    "a.ts": ("libx264", "aac", 16_000),
    "a.webm": ("libvpx", "libopus", 48_000),
    "a.mpg": ("mpeg2video", "ac3", 48_000),
    "a.gif": ("gif", None, 16_000),
    "a.wav": (None, "pcm_s16le", 16_000),
    "a.mp3": (None, "libmp3lame", 16_000),
    "a.ac3": (None, "ac3", 48_000),
}
PICTURES = {"a.webp": {"save_all": True, "duration": 100}, "a.jpg": {"exif": Image.Exif()}}


def seed(name: str, folder: Path) -> bytes:
    if name in PICTURES:
        buffer, (first, *others) = BytesIO(), [Image.new("RGB", (64, 32), (i * 40, 9, 9)) for i in range(5)]
        more = {"append_images": others} if name == "a.webp" else {}
        first.save(buffer, name[2:].replace("jpg", "jpeg"), **PICTURES[name], **more)
        return buffer.getvalue()
    codec, audio, rate = FILMS[name]
    options = {"g": "4"} if codec and codec != "gif" else None
    shown = {"frames": 12, "size": (64, 32), "options": options, "pixels": "rgb8" if codec == "gif" else "yuv420p"}
    fps = 25 if codec == "mpeg2video" else 10
    sound = None if audio is None else tone(1.2, rate)
    return write_clip(folder / name, codec, fps=fps, audio=audio, sound=sound, rate=rate, **shown).read_bytes()


def mutated(data: bytes, draw: np.random.Generator) -> bytes:
    """The file cut short, with bits turned over, with other bytes near its start, or with a part wiped out."""
    changed, size = bytearray(data), len(data)
    match int(draw.integers(4)):
        case 0:
            return data[: draw.integers(1, size)]
        case 1:
            for place in draw.integers(size, size=draw.integers(1, 20)):
                changed[place] ^= 1 << int(draw.integers(8))
        case 2:
            for place in draw.integers(min(2000, size), size=draw.integers(1, 8)):
                changed[place] = int(draw.integers(256))
        case _:
            start = int(draw.integers(size))
            stop = min(size, start + int(draw.integers(1, 64)))
            changed[start:stop] = bytes([int(draw.choice([0, 255]))]) * (stop - start)
    return bytes(changed)


def use(clip: Clip) -> None:
    """All that is asked of a clip; what cannot be read raises MediaError."""
    aligned = clip.aligned()
    if aligned.video is not None:
        assert aligned.video.frames > 0
        last = aligned.video.frames - 1
        assert np.isfinite(aligned.video.seconds([0, last])).all()
        assert len(aligned.video.read([0, last // 2, last])) == 3
    if aligned.audio is not None:
        assert np.isfinite(aligned.audio.read(16_000)).all()
        aligned.audio.native(0, 1.0)
        aligned.audio.read(16_000, [(0, 100), (500, 8000)])


@pytest.mark.filterwarnings("ignore::fastav.media.MediaWarning")
@pytest.mark.parametrize("name", [*FILMS, *PICTURES])
def test_a_mutated_file_is_a_clip_or_an_error(name: str, tmp_path: Path) -> None:
    data, draw = seed(name, tmp_path), np.random.default_rng(7)
    outcomes = []
    for number in range(ROUNDS):
        path = tmp_path / f"{number}_{name}"
        path.write_bytes(mutated(data, draw))
        began = time.perf_counter()
        try:
            use(Clip.open(path if number % 2 else path.read_bytes()))
            outcomes.append("a clip")
        except MediaError as error:
            outcomes.append(error.message)
        assert time.perf_counter() - began < SECONDS
    assert all(outcomes)


def test_frames_behind_a_first_packet_that_does_not_decode_are_counted() -> None:
    """Its packets do not tell the order, so frames are counted; it was a track of no frames."""
    track = Clip.open(CASES / "damaged_start.flv").require_video()
    assert track.frames == 8
    assert len(track.read([0, 7])) == 2
