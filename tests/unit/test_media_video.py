"""Frames are the ones asked for, in every container, and turned upright."""

import struct
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastav.errors import UnreadableMedia
from fastav.media import Clip, MediaWarning
from fastav.media._frames import nominal_ticks, upright
from fastav.media._timeline import Timeline, is_displayed
from media_files import decode_everything, number_of, numbered, numbers, write_clip

GOP = {"bf": "3", "g": "10"}
OPEN_GOP = {"bf": "3", "g": "8", "x264-params": "open-gop=1:scenecut=0"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
VARYING = np.cumsum([0.0] + [0.02, 0.5, 0.04, 0.3] * 9 + [0.1] * 3)

KINDS = {
    "mp4 with B-frames": {"name": "a.mp4", "options": GOP},
    "mp4 with open groups": {"name": "a.mp4", "options": OPEN_GOP},
    "mp4 in fragments": {"name": "a.mp4", "options": GOP, "muxer": FRAGMENTS},
    "mp4 of varying rate": {"name": "a.mp4", "options": GOP, "times": VARYING},
    "mkv of varying rate": {"name": "a.mkv", "options": GOP, "times": VARYING},
    "mkv, H.265, open groups": {
        "name": "a.mkv",
        "codec": "libx265",
        "options": {"x265-params": "open-gop=1:keyint=8:log-level=none"},
    },
    "mov": {"name": "a.mov", "codec": "mpeg4", "options": {"g": "6"}},
    "avi": {"name": "a.avi", "codec": "mpeg4", "options": {"g": "6"}},
    "avi with H.264": {"name": "a.avi", "options": {"g": "6", "bf": "0"}},
    "avi with B-frames": {"name": "a.avi", "options": GOP},
    "raw H.264": {"name": "a.h264", "options": GOP},
    "ts, H.264": {"name": "a.ts", "options": OPEN_GOP},
    "ts, MPEG-2": {"name": "a.ts", "codec": "mpeg2video", "options": {"bf": "2", "g": "8"}},
    "webm, VP8": {"name": "a.webm", "codec": "libvpx", "options": {"g": "7", "deadline": "realtime"}},
    "webm, VP9": {"name": "a.webm", "codec": "libvpx-vp9", "options": {"g": "7", "deadline": "realtime"}},
    "webm, live": {"name": "a.webm", "codec": "libvpx", "options": {"g": "7"}, "muxer": {"live": "1"}},
    "gif": {"name": "a.gif", "codec": "gif", "pixels": "rgb8"},
}


@pytest.fixture(params=KINDS, scope="module")
def clip_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = dict(KINDS[request.param])
    return write_clip(tmp_path_factory.mktemp("clip") / str(kind.pop("name")), **kind)


@pytest.fixture(scope="module")
def everything(clip_file: Path) -> np.ndarray:
    return decode_everything(clip_file)


@pytest.mark.parametrize("indices", [[], range(40), [3, 3, 20, 38, 38]])
def test_frames_come_one_at_a_time_as_they_are_read(clip_file: Path, indices) -> None:
    track = Clip.open(clip_file).require_video()
    assert [number_of(picture) for picture in track.each(list(indices))] == list(indices)


def test_frames_that_come_one_at_a_time_are_asked_for_in_order(tmp_path: Path) -> None:
    track = Clip.open(write_clip(tmp_path / "a.mp4")).require_video()
    with pytest.raises(ValueError, match="must not decrease"):
        next(track.each([3, 2]))
    with pytest.raises(IndexError):
        next(track.each([40]))


@pytest.mark.parametrize(
    "indices", [range(40), range(39, -1, -1), [0], [39], [3, 3, 21, 20, 3, 38], [7, 8, 9, 15, 16, 17], [33, 1]]
)
def test_reading_is_decoding_everything_and_indexing(clip_file: Path, everything: np.ndarray, indices) -> None:
    track = Clip.open(clip_file).require_video()
    assert track.frames == 40
    pictures = track.read(list(indices))
    assert numbers(pictures) == list(indices)
    np.testing.assert_array_equal(pictures, everything[list(indices)])


def test_nothing_asked_is_nothing_read(clip_file: Path) -> None:
    track = Clip.open(clip_file).require_video()
    assert track.read([]).shape == (0, 64, 128, 3)
    assert track.seconds([]).shape == (0,)


@pytest.mark.parametrize("kind", [k for k in KINDS if "varying" not in k and "raw" not in k])
def test_a_constant_rate_gives_rate_duration_and_seconds(kind: str, tmp_path: Path) -> None:
    options = dict(KINDS[kind])
    track = Clip.open(write_clip(tmp_path / str(options.pop("name")), **options)).require_video()
    assert (track.width, track.height) == (128, 64)
    assert track.fps == pytest.approx(10)
    assert track.duration == pytest.approx(4, abs=0.01)
    np.testing.assert_allclose(track.seconds([0, 39, 17]), [0, 3.9, 1.7], atol=1e-3)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_varying_rate_keeps_its_times(name: str, tmp_path: Path) -> None:
    track = Clip.open(write_clip(tmp_path / name, options=GOP, times=VARYING)).require_video()
    np.testing.assert_allclose(track.seconds(range(40)), VARYING, atol=2e-3)
    assert track.fps == pytest.approx(40 / track.duration, rel=0.01)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_rotated_file_is_read_upright(degrees: int, tmp_path: Path) -> None:
    plain = Clip.open(write_clip(tmp_path / "plain.mp4")).require_video()
    turned = Clip.open(write_clip(tmp_path / "turned.mp4", rotation=degrees)).require_video()
    assert (turned.width, turned.height) == ((128, 64) if degrees == 180 else (64, 128))
    expected = np.rot90(plain.read([5, 30]), k=degrees // 90, axes=(1, 2))
    np.testing.assert_array_equal(turned.read([5, 30]), expected)


ORIENTATION = 0x0112  # of EXIF: 1 is upright, 2 to 8 are mirrored and turned


def photo(orientation: int | None) -> bytes:
    """A JPEG with EXIF, no two corners alike; None: without."""
    picture = np.zeros((48, 80, 3), np.uint8)
    picture[:24, :40], picture[:24, 40:], picture[24:, :40] = (250, 20, 20), (20, 250, 20), (20, 20, 250)
    tags = Image.Exif()
    tags[ORIENTATION] = orientation or 1
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=95, **({} if orientation is None else {"exif": tags}))
    return buffer.getvalue()


def photo_film(path: Path, orientation: int | None) -> Path:
    """Such JPEGs as the frames of a film."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuvj420p"
        for number in range(5):
            packet = av.Packet(photo(orientation))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 10)
            packet.is_keyframe = True
            container.mux(packet)
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.mov"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_photos_with_exif_are_upright(orientation: int | None, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(photo(orientation)) if name == "a.jpg" else photo_film(path, orientation)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(photo(orientation)))))
    track = Clip.open(path).require_video()
    assert (track.height, track.width) == expected.shape[:2]
    found = track.read([track.frames - 1])[0]
    assert np.abs(found.astype(int) - expected).mean() < 6


@pytest.mark.parametrize("frames", [60, 700])
def test_a_trimmed_file_begins_and_ends_where_its_edit_list_says(frames: int, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", frames=frames, fps=1, options={"bf": "2", "g": "20"})
    data = bytearray(path.read_bytes())
    edit = data.index(b"elst") + 12
    length, start = struct.unpack_from(">Ii", data, edit)
    second = length // frames * 16_384 // 1000
    struct.pack_into(">Ii", data, edit, length - 15_000, start + 13 * second)
    path.write_bytes(data)
    track = Clip.open(path).require_video()
    assert track.frames == frames - 15
    assert track.fps == pytest.approx(1, rel=0.01)
    picked = [0, 5, 7, 8, 30, frames - 16]
    assert numbers(track.read(picked)) == [i + 13 for i in picked]
    np.testing.assert_allclose(track.seconds(picked), picked, atol=0.01)


def test_a_matrix_mirrors_and_turns() -> None:
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    np.testing.assert_array_equal(upright(picture, (1, 0, 0, 1)), picture)
    np.testing.assert_array_equal(upright(picture, (-1, 0, 0, 1)), picture[:, ::-1])
    np.testing.assert_array_equal(upright(picture, (1, 0, 0, -1)), picture[::-1])
    np.testing.assert_array_equal(upright(picture, (0, 1, 1, 0)), picture.transpose(1, 0, 2))
    np.testing.assert_array_equal(upright(picture, (0, 1, -1, 0)), np.rot90(picture, k=-1))


@pytest.mark.parametrize("indices", [[40], [-1], [0, 1000]])
def test_an_index_outside_the_track_is_refused(indices: list[int], tmp_path: Path) -> None:
    track = Clip.open(write_clip(tmp_path / "a.mp4")).require_video()
    with pytest.raises(IndexError, match=r"not in \[0, 40\)"):
        track.read(indices)
    with pytest.raises(IndexError):
        track.seconds(indices)


def test_indices_may_be_an_array(tmp_path: Path) -> None:
    track = Clip.open(write_clip(tmp_path / "a.mp4")).require_video()
    assert numbers(track.read(np.array([4, 2]))) == [4, 2]


def test_arrays_are_read_like_files() -> None:
    frames = np.stack([numbered(i) for i in range(6)])
    clip = Clip.from_arrays(frames=frames, fps=2.0, name="bars")
    track = clip.require_video()
    assert (track.frames, track.fps, track.width, track.height, clip.duration) == (6, 2.0, 128, 64, 3.0)
    np.testing.assert_array_equal(track.read([5, 0, 5]), frames[[5, 0, 5]])
    assert track.seconds([5, 0]).tolist() == [2.5, 0]


def test_too_many_frames_at_once_are_refused() -> None:
    clip = Clip.from_arrays(frames=np.zeros((1, 4096, 4096, 3), np.uint8))
    with pytest.raises(UnreadableMedia, match=r"100 frames of 4096 x 4096 would take 5\.0 GB; the limit is 4\.3 GB"):
        clip.require_video().read([0] * 100)


@settings(deadline=None)  # a busy machine is no fault
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([10.0, 25.0, 30000 / 1001]))
def test_a_nominal_time_lies_within_its_frame(frame: int, first: int, fps: float) -> None:
    tick = Fraction(1, 90_000)
    pts = (nominal_ticks(frame, first, fps, tick) - first) * tick
    assert frame / fps <= pts < (frame + 1) / fps


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(st.integers(0, 500), min_size=1, unique=True), st.data())
def test_decoding_starts_at_the_last_keyframe_not_after_the_frame(times: list[int], data: st.DataObject) -> None:
    pts = np.sort(np.array(times))
    others = data.draw(st.sets(st.sampled_from(times)))
    keys = np.array(sorted({int(pts[0]), *others}))
    timeline = Timeline(pts=pts, keys=keys, key_rank=np.searchsorted(pts, keys), end=501, complete_until=501)
    frame = data.draw(st.integers(0, len(times) - 1))
    entries = timeline.entries(frame)
    assert entries[0] == max(k for k in keys if k <= pts[frame])
    assert entries == sorted(entries, reverse=True)


def test_the_hidden_frames_of_vp8_are_not_counted(tmp_path: Path) -> None:
    with av.open(str(write_clip(tmp_path / "a.webm", "libvpx", frames=3))) as container:
        stream = container.streams.video[0]
        packet = next(container.demux(stream))
        assert is_displayed(packet, stream)
        hidden = bytes([bytes(packet)[0] & ~0x10]) + bytes(packet)[1:]
        assert not is_displayed(av.Packet(hidden), stream)


def test_numbers_survive_the_codec() -> None:
    assert [number_of(numbered(n)) for n in (0, 1, 7199, 65535)] == [0, 1, 7199, 65535]


def animation(seconds: list[float]) -> bytes:
    """A WebP of numbered frames that last so long."""
    first, *others = [Image.fromarray(numbered(number)) for number in range(len(seconds))]
    buffer, milliseconds = BytesIO(), [round(1000 * s) for s in seconds]
    first.save(buffer, "webp", save_all=True, append_images=others, duration=milliseconds, lossless=True)
    return buffer.getvalue()


def test_an_animated_webp_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(animation([0.1, 0.3, 0.1, 0.5, 0.2]))
    track = Clip.open(path).require_video()
    assert (track.frames, track.width, track.height) == (5, 128, 64)
    assert track.duration == pytest.approx(1.2)
    assert numbers(track.read([4, 0, 2, 2])) == [4, 0, 2, 2]
    np.testing.assert_allclose(track.seconds(range(5)), [0, 0.1, 0.4, 0.5, 1.0])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((UnreadableMedia, MediaWarning), match=r"a\.webp (cannot be read|has \d+ of \d+ kB)"):
        Clip.open(path)  # some versions of Pillow show what is there
