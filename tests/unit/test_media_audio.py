"""Sound is FFmpeg's own mix and resampling, and spans of a track are spans of the whole."""

import subprocess
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from fastav.errors import UnreadableMedia
from fastav.media import Clip
from media_files import decode_mono, tone, with_cover, write_clip

REFERENCE = Path(__file__).parents[1] / "reference" / "videollama2"
LSB = 1 / 32768

KINDS = {
    "wav": {"name": "a.wav", "audio": "pcm_s16le", "rate": 16_000},
    "wav, 8 kHz": {"name": "a.wav", "audio": "pcm_s16le", "rate": 8_000},
    "wav, 96 kHz, 24 bits": {"name": "a.wav", "audio": "pcm_s24le", "rate": 96_000, "layout": "stereo"},
    "wav, 8 bits": {"name": "a.wav", "audio": "pcm_u8", "rate": 22_050},
    "flac": {"name": "a.flac", "audio": "flac", "rate": 44_100, "layout": "stereo"},
    "mp3": {"name": "a.mp3", "audio": "libmp3lame", "rate": 44_100, "layout": "stereo"},
    "m4a": {"name": "a.m4a", "audio": "aac", "rate": 48_000, "layout": "stereo"},
    "m4a, 5.1": {"name": "a.m4a", "audio": "aac", "rate": 48_000, "layout": "5.1"},
    "m4a, 7.1": {"name": "a.m4a", "audio": "aac", "rate": 48_000, "layout": "7.1"},
    "opus": {"name": "a.ogg", "audio": "libopus", "rate": 48_000},
    "mkv": {"name": "a.mkv", "audio": "aac", "rate": 44_100, "codec": "libx264"},
}
CHANNELS = {"mono": 1, "stereo": 2, "5.1": 6, "7.1": 8}


def make(directory: Path, *, seconds: float = 3, **kind) -> Path:
    channels = CHANNELS[kind.get("layout", "mono")]
    sound = tone(seconds, kind["rate"], channels)
    return write_clip(directory / kind.pop("name"), **{"codec": None, "sound": sound, **kind})


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict:
    return dict(KINDS[request.param])


def test_a_track_is_read_as_ffmpeg_mixes_and_resamples_it(kind: dict, tmp_path: Path) -> None:
    path = make(tmp_path, **kind)
    track = Clip.open(path).require_audio()
    assert track.sample_rate == kind["rate"]
    assert track.channels == CHANNELS[kind.get("layout", "mono")]
    assert track.duration == pytest.approx(3, abs=0.1)
    for rate in (16_000, 24_000):
        sound = track.read(rate)
        assert sound.dtype == np.float32
        np.testing.assert_array_equal(sound, decode_mono(path, rate))
        assert track.length(rate) == len(sound)


def test_spans_are_slices_of_the_whole(kind: dict, tmp_path: Path) -> None:
    track = Clip.open(make(tmp_path, **kind)).require_audio()
    whole = track.read(16_000)
    spans = [(0, 32_000), (10, 10), (30_000, 99_000), (10**6, 10**6 + 5)]
    for part, (start, end) in zip(track.read(16_000, spans), spans, strict=True):
        np.testing.assert_array_equal(part, whole[start:end])


def test_native_samples_are_not_mixed_or_resampled(kind: dict, tmp_path: Path) -> None:
    track = Clip.open(make(tmp_path, **kind)).require_audio()
    every = track.native()
    assert every.dtype == np.float64
    assert every.shape[0] == track.channels
    assert every.shape[1] == pytest.approx(track.samples, abs=3000)
    np.testing.assert_array_equal(track.native(channel=track.channels - 1), every[-1])
    np.testing.assert_array_equal(track.native(max_seconds=0.5), every[:, : track.sample_rate // 2])


def test_16_bit_samples_are_exact(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, (5000, 2)).astype("<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, 2, 44_100, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    track = Clip.open(tmp_path / "a.wav").require_audio()
    assert track.samples == 5000
    np.testing.assert_array_equal(track.native(), samples.T / 32768)


def test_the_reference_clip_sounds_as_it_did_to_the_original() -> None:
    golden = np.load(REFERENCE / "golden_preprocess.npz")
    clip = Clip.open(REFERENCE / "clip.mp4")
    sound = clip.require_audio().read(16_000)
    assert sound.shape == golden["waveform_s16"].reshape(-1).shape
    assert np.abs(sound * 32768 - golden["waveform_s16"].reshape(-1)).max() <= 2
    frames = clip.require_video().read(golden["frame_indices"].tolist())
    assert np.abs(frames.astype(int) - golden["frames_u8"]).max() <= 2
    assert clip.require_video().frames == 60


@pytest.mark.parametrize(
    ("clip", "golden", "scale"),
    [
        ("video_salmonn2/clip_long.mp4", "video_salmonn2/golden_av2seg.npz:waveform_int16", 32768),
        ("video_salmonn2/clip_short.mp4", "video_salmonn2/golden_av.npz:waveform_int16", 32768),
        ("video_salmonn2_plus/clip.mp4", "video_salmonn2_plus/golden_av.npz:waveform_float32", 1),
    ],
)
def test_the_last_packet_of_an_mp4_is_heard_whole(clip: str, golden: str, scale: int) -> None:
    file, name = golden.split(":")
    expected = np.load(REFERENCE.parent / file)[name].reshape(-1) / scale
    sound = Clip.open(REFERENCE.parent / clip).require_audio().read(16_000)
    assert sound.shape == expected.shape
    assert np.abs(sound - expected).max() <= 2 * LSB


def test_tags_that_are_not_utf8_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    with av.open(str(path), "w", container_options={}) as container:
        container.metadata["title"] = "cafe au lait"
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    path.write_bytes(path.read_bytes().replace(b"cafe", b"caf\xe9"))
    assert len(Clip.open(path).require_audio().read(16_000)) == 16_000


def test_arrays_sound_like_files(tmp_path: Path) -> None:
    sound = tone(2, 44_100, 2)
    path = write_clip(tmp_path / "a.wav", None, audio="pcm_f32le", sound=sound, rate=44_100, layout="stereo")
    of_array = Clip.from_arrays(waveform=sound, sample_rate=44_100).require_audio()
    np.testing.assert_array_equal(of_array.read(16_000), Clip.open(path).require_audio().read(16_000))
    np.testing.assert_array_equal(of_array.native(1), sound[1])
    np.testing.assert_array_equal(of_array.read(16_000, [(5, 50)])[0], of_array.read(16_000)[5:50])


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8])
def test_arrays_may_have_any_number_of_channels(channels: int) -> None:
    clip = Clip.from_arrays(waveform=tone(0.5, 16_000, channels), sample_rate=16_000)
    assert clip.require_audio().read(8_000).shape == (4000,)
    assert clip.require_audio().native().shape == (channels, 8000)


def test_a_long_array_gives_the_same_spans_as_the_whole() -> None:
    rate = 11_025
    track = Clip.from_arrays(waveform=tone(601, rate), sample_rate=rate).require_audio()
    whole = track.read(16_000)
    for start in (0, 777, 16_000 * 300 + 1, 16_000 * 600):
        part = track.read(16_000, [(start, start + 32_000)])[0]
        assert np.abs(part - whole[start : start + 32_000]).max() <= 2 * LSB
        assert len(part) == len(whole[start : start + 32_000])


def test_a_silent_track_is_silence(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", audio="aac", sound=np.zeros((1, 32_000), np.float32))
    assert not Clip.open(path).require_audio().read(16_000).any()


def test_a_cover_picture_is_not_a_video_track(tmp_path: Path) -> None:
    path = with_cover(make(tmp_path, name="a.mp3", audio="libmp3lame", rate=16_000))
    clip = Clip.open(path)
    assert clip.video is None
    assert len(clip.require_audio().read(16_000)) == pytest.approx(48_000, abs=3000)


def test_a_damaged_packet_is_left_out(tmp_path: Path) -> None:
    path = make(tmp_path, name="a.mp3", audio="libmp3lame", rate=16_000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 900] = b"\x55" * 900
    path.write_bytes(data)
    assert 30_000 < len(Clip.open(path).require_audio().read(16_000)) < 50_000


@pytest.mark.parametrize("span", [(-1, 5), (5, 4)])
def test_a_span_that_runs_backwards_is_refused(span: tuple[int, int]) -> None:
    track = Clip.from_arrays(waveform=tone(1, 16_000), sample_rate=16_000).require_audio()
    with pytest.raises(ValueError, match="0 <= start <= end"):
        track.read(16_000, [span])


def test_a_channel_that_is_not_there_is_refused() -> None:
    track = Clip.from_arrays(waveform=tone(1, 16_000), sample_rate=16_000).require_audio()
    with pytest.raises(IndexError, match=r"channel 1 is not in \[0, 1\)"):
        track.native(1)


def test_more_sound_than_fits_is_refused() -> None:
    track = Clip.from_arrays(waveform=tone(1, 16_000), sample_rate=16_000).require_audio()
    with pytest.raises(UnreadableMedia, match=r"the limit is 4\.3 GB"):
        track.read(2**31)


def test_a_track_without_samples_says_so(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
    track = Clip.open(tmp_path / "a.wav").require_audio()
    assert track.samples == 0
    for read in (lambda: track.read(16_000), track.native):
        with pytest.raises(UnreadableMedia, match=r"audio track of a\.wav holds no sample"):
            read()


def test_importing_media_does_not_import_torch() -> None:
    code = "import sys, fastav.media; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
