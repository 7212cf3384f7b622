"""video-SALMONN 2's processor, apart from what the original's arrays show."""

from typing import Any

import numpy as np
import pytest
import torch

from fastav.errors import MediaError
from fastav.models.video_salmonn2 import Scheme, VideoSalmonn2Processor, sample_frames, spectrograms
from support.native import VIDEO_SALMONN2 as FAMILY

RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
SOUND = RANDOM.uniform(-0.5, 0.5, 50_000).astype(np.float32)
RELEASE = Scheme()


@pytest.fixture(scope="module")
def processor() -> Any:
    return FAMILY.processor()


def runs(ids: torch.Tensor, scheme: Scheme) -> list[tuple[str, int]]:
    """Runs of video, audio, blank and other tokens, with their lengths."""
    names = {scheme.video_token_id: "video", scheme.audio_token_id: "audio", scheme.blank_token_id: "blank"}
    out: list[tuple[str, int]] = []
    for token in ids.tolist():
        name = names.get(token, "text")
        count = out.pop()[1] if out and out[-1][0] == name else 0
        out.append((name, count + 1))
    return out


@pytest.mark.parametrize(("seconds", "fps", "wanted"), [(10, 25, 10), (10, 29.97, 10), (110, 25, 110), (180, 25, 110)])
def test_frames_are_one_a_second_up_to_the_cap(seconds: int, fps: float, wanted: int) -> None:
    frames = int(seconds * fps)
    indices = sample_frames(frames, fps)
    assert len(indices) == wanted
    assert indices[0] == 0
    assert (np.diff(indices) > 0).all()
    if seconds > 110:
        assert indices[-1] == frames - 1
    else:
        assert (np.diff(indices) == round(fps)).all()


def test_slow_videos_give_every_frame() -> None:
    assert sample_frames(7, 0.5).tolist() == list(range(7))


@pytest.mark.parametrize(
    ("seconds", "frames", "each", "block"), [(10, 10, 6, 1880), (30, 30, 2, 5520), (60, 60, 2, 11_040)]
)
def test_sound_is_spread_over_the_frames_of_the_release(seconds: int, frames: int, each: int, block: int) -> None:
    tokens = RELEASE.piece_tokens * -(-seconds // 30)
    spread, rest = RELEASE.spread(tokens, frames, seconds)
    assert spread.shape == (frames, each)
    assert spread.ravel().tolist() == list(range(tokens))
    assert len(rest) == 0
    assert frames * (RELEASE.frame_tokens + each) == block


def test_tokens_are_repeated_to_fill_the_frames() -> None:
    spread, rest = RELEASE.spread(240, 110, 110)
    assert spread.shape == (110, 3)
    assert spread.ravel().tolist() == [j * 240 // 330 for j in range(330)]
    assert len(rest) == 0


def test_below_one_point_two_seconds_some_sound_is_left_for_the_end() -> None:
    spread, rest = RELEASE.spread(60, 2, 1.1)
    assert spread.ravel().tolist() == [j * 55 // 56 for j in range(56)]
    assert rest.tolist() == [55, 56, 57, 58, 59]


def test_frames_and_sound_are_interleaved(processor: Any) -> None:
    inputs = processor(processor.prompt("?", video=True), videos=[FRAMES], audio=[SOUND], video_seconds=3.0)
    found = runs(inputs["input_ids"][0], processor.media)
    assert found[1:-1] == [("video", 20), ("audio", 20)] * 3
    assert inputs["audio_index"].tolist() == list(range(60))
    assert inputs["feature_attention_mask"].sum() == 300  # the sound is cut where the video ends


def test_rest_of_the_sound_follows_all_frames(processor: Any) -> None:
    inputs = processor(processor.prompt("?", video=True), videos=[FRAMES[:2]], audio=[SOUND], video_seconds=1.0)
    assert runs(inputs["input_ids"][0], processor.media)[1:-1] == [
        ("video", 20),
        ("audio", 25),
        ("video", 20),
        ("audio", 25 + 10),
    ]
    assert inputs["audio_index"].tolist() == list(range(60))


def test_silent_frames_are_followed_by_their_time(processor: Any) -> None:
    inputs = processor(processor.prompt("?", video=True), videos=[FRAMES], video_seconds=15.1)
    ids, scheme = inputs["input_ids"][0], processor.media
    found = runs(ids, scheme)
    assert found[1:4] == [("video", 20), ("text", 3), ("blank", 1)]  # "5.0", then "10.1"
    assert found[4:7] == [("video", 20), ("text", 4), ("video", 20)]
    ends = [i for i, token in enumerate(ids.tolist()) if token == scheme.video_token_id][19::20]
    assert [processor.tokenizer.decode(ids[i + 1 : i + 4]) for i in ends] == ["5.0", "10.", "15."]


def test_times_may_be_left_out(processor: Any) -> None:
    plain = VideoSalmonn2Processor(processor.tokenizer, scheme=processor.scheme | {"time_tokens": False})
    inputs = plain(plain.prompt("?", video=True), videos=[FRAMES])
    assert runs(inputs["input_ids"][0], plain.media)[1:-1] == [("video", 60)]


def test_a_video_of_unknown_length_lasts_a_second_a_frame(processor: Any) -> None:
    prompt = processor.prompt("?", video=True)
    ours, wanted = (processor(prompt, videos=[FRAMES], video_seconds=seconds) for seconds in (None, 3))
    assert torch.equal(ours["input_ids"], wanted["input_ids"])


def test_sounds_of_a_batch_are_counted_through(processor: Any) -> None:
    prompt = processor.prompt("?", video=False, audio=True)
    long = np.zeros(30 * 16_000 + 1, np.float32)
    inputs = processor([prompt] * 3, audio=[SOUND, long, SOUND])
    assert inputs["input_features"].shape == (4, 128, 3000)
    assert inputs["piece_index"].tolist() == [0, 0, 1, 0]
    assert inputs["audio_index"].tolist() == list(range(240))
    assert inputs["feature_attention_mask"].sum(1).tolist() == [313, 3000, 1, 313]


def test_sound_alone_is_cut_at_the_cap(processor: Any) -> None:
    short = VideoSalmonn2Processor(processor.tokenizer, scheme=processor.scheme | {"max_time": 2})
    inputs = short(short.prompt("?", video=False, audio=True), audio=[SOUND])
    assert int(inputs["feature_attention_mask"].sum()) == 200
    assert torch.equal(inputs["input_features"], spectrograms(SOUND[:32_000])[0])


def test_no_sound_at_all_is_silence() -> None:
    features, heard = spectrograms(np.zeros(0, np.float32))
    assert features.shape == (1, 128, 3000)
    assert torch.equal(features, spectrograms(np.zeros(16_000, np.float32))[0])
    assert not heard.any()


def test_windows_without_sound_are_known() -> None:
    _, columns = spectrograms(np.ones(16_000 * 10 + 1, np.float32))
    heard = RELEASE.has_sound(columns.numpy())
    assert heard.tolist() == [True] * 21 + [False] * 39
    overlapping = Scheme(second_per_window=1.0, second_stride=0.5, query_tokens=2)
    assert overlapping.piece_tokens == 59 * 2
    assert overlapping.has_sound(columns.numpy()).sum() == 21 * 2


def test_as_many_lengths_as_prompts_are_needed(processor: Any) -> None:
    with pytest.raises(MediaError, match=r"one entry per prompt \(1\), got 2"):
        processor(processor.prompt("?"), videos=[FRAMES], video_seconds=[1.0, 2.0])
