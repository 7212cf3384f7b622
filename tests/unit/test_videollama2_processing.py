"""VideoLLaMA2's processor, apart from what the original's arrays show."""

from typing import Any

import numpy as np
import pytest
import torch

from fastav.errors import MediaError
from fastav.models.videollama2 import clip_bounds, file_features, soundtrack_features
from support.native import VIDEOLLAMA2 as FAMILY

RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (8, 40, 60, 3), dtype=np.uint8)
SOUND = RANDOM.uniform(-0.5, 0.5, 70_000).astype(np.float32)


@pytest.fixture(scope="module")
def processor() -> Any:
    return FAMILY.processor()


def test_sound_may_come_cut_or_whole(processor: Any) -> None:
    prompt = processor.prompt("?", video=True)
    pieces = [SOUND[start:end] for start, end in clip_bounds(len(SOUND))]
    whole, cut = (processor(prompt, videos=FRAMES, audio=audio) for audio in (SOUND, [pieces]))
    assert torch.equal(whole["input_features"], cut["input_features"])
    assert torch.equal(whole["feature_attention_mask"], cut["feature_attention_mask"])


def test_scheme_of_a_sound_is_a_soundtracks_only_with_a_video(processor: Any) -> None:
    prompt = processor.prompt("?", video=False, audio=True)
    file, track = (processor(prompt, audio=SOUND, audio_from_video=flag) for flag in (None, True))
    assert torch.equal(file["input_features"][0], file_features(SOUND, 16_000, processor.media)[0])
    assert torch.equal(track["input_features"][0], soundtrack_features(SOUND, processor.media)[0])
    assert not torch.equal(file["input_features"], track["input_features"])


def test_only_the_first_thirty_seconds_of_a_file_are_heard(processor: Any) -> None:
    sound = RANDOM.normal(size=31 * 8000)
    features, heard = file_features(sound, 8000, processor.media)
    assert torch.equal(features, file_features(sound[: 30 * 8000], 8000, processor.media)[0])
    assert heard.all()


@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.0, 5.0, 18.0, 60.0])
def test_a_soundtrack_is_sixteen_seconds_at_most(seconds: float) -> None:
    samples = int(seconds * 16_000)
    _, heard = soundtrack_features(np.ones(samples, np.float32))
    assert int(heard.sum()) == 100 * min(seconds, 2) * 8


def test_no_sound_at_all_is_silence() -> None:
    for features, heard in (
        soundtrack_features(np.zeros(0, np.float32)),
        soundtrack_features([]),
        file_features(np.zeros(0), 44_100),
    ):
        assert features.shape == (2998, 128)
        assert torch.equal(features, torch.full_like(features, -15.9375))  # log of float32's epsilon, in bfloat16
        assert not heard.any()


def test_missing_frames_are_black(processor: Any) -> None:
    inputs = processor(processor.prompt("?", video=True), videos=[FRAMES[:3]])
    pixels = inputs["pixel_values_videos"]
    assert pixels.shape == (1, 8, 3, 75, 75)
    assert (pixels[0, 3:] == -1).all()
    assert not (pixels[0, 2] == -1).all()


def test_at_most_thirty_two_frames_are_kept(processor: Any) -> None:
    many = np.repeat(FRAMES, 5, axis=0)
    inputs = processor(processor.prompt("?", video=True), videos=many)
    assert inputs["pixel_values_videos"].shape[1] == 32
    assert int((inputs["input_ids"] == processor.media.video_token_id).sum()) == processor.media.video_tokens(32)


def test_videos_of_a_batch_have_as_many_frames(processor: Any) -> None:
    with pytest.raises(MediaError, match="as many frames each"):
        processor([processor.prompt("?", video=True)] * 2, videos=[FRAMES, np.repeat(FRAMES, 2, axis=0)])
