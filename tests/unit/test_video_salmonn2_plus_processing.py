"""video-SALMONN 2+'s processor and scheme, apart from what the original's arrays show."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from fastav.errors import MediaError
from fastav.media import Clip
from fastav.models.video_salmonn2_plus import (
    Scheme,
    audio_per_step,
    audio_tokens,
    patches,
    row_positions,
    sample_frames,
    spectrograms,
)
from fastav.models.video_salmonn2_plus import video as video_module
from fastav.models.video_salmonn2_plus.video import read_frames
from support.native import VIDEO_SALMONN2_PLUS as FAMILY

RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (8, 56, 84, 3), dtype=np.uint8)  # 4 steps of 2 x 3 tokens
SOUND = RANDOM.uniform(-0.5, 0.5, 4 * 16_000).astype(np.float32)
SCHEME = Scheme()


@pytest.fixture(scope="module")
def processor() -> Any:
    return FAMILY.processor()


# --- the scheme's numbers


@pytest.mark.parametrize(("seconds", "frames"), [(0.1, 16), (1.6, 16), (1.7, 17), (10, 100), (76.8, 768), (600, 768)])
def test_frames_come_every_tenth_of_a_second_within_bounds(seconds: float, frames: int) -> None:
    assert SCHEME.frames(float(seconds)) == frames


@pytest.mark.parametrize("frames", [16, 100, 400, 767, 768])
def test_budget_of_pixels_is_about_constant(frames: int) -> None:
    limit = 61_250 if frames == 768 else 0.95 * 768 / frames * 61_250
    assert SCHEME.most_pixels(frames) == pytest.approx(limit)
    height, width = SCHEME.size(frames, 2160, 3840)
    assert height % 28 == width % 28 == 0
    assert 0.5 * limit < height * width <= limit
    steps, rows, columns = SCHEME.grid(frames, height, width)
    assert (steps, rows * 28, columns * 28) == (math.ceil(frames / 2), height, width)
    assert steps * rows * columns <= 30_000


def test_small_frames_keep_their_size_but_for_a_minimum() -> None:
    assert SCHEME.size(100, 84, 112) == (84, 112)
    assert SCHEME.size(100, 90, 100) == (84, 112)  # to the nearest multiple
    height, width = SCHEME.size(100, 20, 20)
    assert height * width >= 3136
    with pytest.raises(MediaError, match="cannot be used"):
        SCHEME.size(100, 8, 2000)


@pytest.mark.parametrize(("samples", "tokens"), [(0, 60), (1, 60), (480_000, 60), (480_001, 120), (1_000_000, 180)])
def test_sound_comes_in_whole_pieces(samples: int, tokens: int) -> None:
    assert audio_tokens(samples) == tokens


def test_sound_follows_the_steps_and_padding_the_last() -> None:
    assert audio_per_step(4, 1.0, 60) == [2, 2, 2, 54]
    counts = audio_per_step(50, 0.2, 60)  # 10 s at 10 frames a second
    assert [sum(counts[:step]) for step in range(50)] == [math.floor(0.4 * step + 1e-9) for step in range(50)]
    assert sum(counts) == 60
    assert audio_per_step(1, 1.0, 60) == [60]
    assert audio_per_step(3, 1.0, 0) == [0, 0, 0]
    assert audio_per_step(100, 1.0, 60) == [2] * 30 + [0] * 70  # sound that ends before the picture


@pytest.mark.parametrize(("frames", "count", "wanted"), [(40, 8, [0, 5, 11, 16, 22, 27, 33, 39]), (1, 3, [0] * 3)])
def test_frames_are_evenly_spaced(frames: int, count: int, wanted: list[int]) -> None:
    assert sample_frames(frames, count).tolist() == wanted


def test_few_frames_repeat() -> None:
    assert sample_frames(3, 7).tolist() == [0, 0, 0, 1, 1, 1, 2]


# --- positions


def block(steps: int, tokens: int, sounds: list[int]) -> np.ndarray:
    """Three text tokens, a clip, two text tokens."""
    run = [t for count in sounds for t in [SCHEME.video_token_id] * tokens + [SCHEME.audio_token_id] * count]
    assert len(sounds) == steps
    return np.array([1, 2, 3, *run, 4, 5])


def test_script_positions_take_the_first_tokens_of_the_clip_for_its_video() -> None:
    ids = block(2, 2, [1, 3])
    ours = row_positions(ids, (2, 1, 2), 0.2, Scheme(positions="script"))
    # video video audio video | video audio audio audio text text
    assert ours[0].tolist() == [0, 1, 2, 3, 3, 5, 5, 6, 7, 8, 9, 10, 11]
    assert ours[1].tolist() == [0, 1, 2, 3, 3, 3, 3, 6, 7, 8, 9, 10, 11]
    assert ours[2].tolist() == [0, 1, 2, 3, 4, 3, 4, 6, 7, 8, 9, 10, 11]


def test_script_positions_go_on_behind_the_widest_axis() -> None:
    ours = row_positions(block(1, 6, [0]), (1, 1, 6), 0.2, Scheme(positions="script"))
    assert ours[:, -2:].tolist() == [[9, 10]] * 3


def test_dataset_positions_place_video_and_audio_on_the_clips_time() -> None:
    ids = block(3, 2, [1, 0, 2])
    ours = row_positions(ids, (3, 1, 2), 0.8, Scheme(positions="dataset"))
    assert ours[0].tolist() == [0, 1, 2, 3, 3, 3, 4, 4, 6, 6, 4, 5, 7, 8]
    assert ours[1].tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 7, 8]
    assert ours[2].tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 3, 4, 4, 5, 7, 8]


def test_dataset_positions_go_on_behind_the_latest_time() -> None:
    ours = row_positions(block(1, 6, [0]), (1, 1, 6), 0.2, Scheme(positions="dataset"))
    assert ours[:, -2:].tolist() == [[4, 5]] * 3


def test_positions_that_cannot_be_known_are_an_error() -> None:
    ids = block(2, 2, [1, 3])
    with pytest.raises(MediaError, match="unknown size"):
        row_positions(ids, None, None, SCHEME)
    with pytest.raises(MediaError, match="holds 4 video tokens, its grid has 2 x 2 x 2"):
        row_positions(ids, (2, 2, 2), None, SCHEME)
    with pytest.raises(MediaError, match="needs to know when frames are shown"):
        row_positions(ids, (2, 1, 2), None, Scheme(positions="dataset"))


# --- frames and sound


def test_patches_are_cut_token_by_token() -> None:
    ours = patches(FRAMES, SCHEME).reshape(4, 2, 3, 2, 2, 3, 2, 14, 14)
    mean, std = 0.48145466, 0.26862954
    pixel = FRAMES[3, 28 + 14 + 5, 2 * 28 + 6, 0]  # step 1, its second frame; token (1, 2), its patch (1, 0)
    assert ours[1, 1, 2, 1, 0, 0, 1, 5, 6] == pytest.approx((pixel / 255 - mean) / std, abs=1e-5)


def test_a_frame_without_partner_is_repeated() -> None:
    assert torch.equal(patches(FRAMES[:3], SCHEME), patches(FRAMES[[0, 1, 2, 2]], SCHEME))


def test_a_track_is_read_and_scaled_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    track = Clip.from_arrays(frames=RANDOM.integers(0, 256, (9, 90, 130, 3), dtype=np.uint8)).require_video()
    indices = sample_frames(9, 16)
    whole = read_frames(track, indices, SCHEME)
    monkeypatch.setattr(video_module, "GROUP", 3)
    assert (read_frames(track, indices, SCHEME) == whole).all()
    assert whole.shape == (16, 84, 140, 3)
    wanted = Image.fromarray(track.read([0])[0]).resize((140, 84), Image.Resampling.BICUBIC)
    assert (whole[0] == np.asarray(wanted)).all()


def test_every_piece_of_sound_is_heard_by_itself() -> None:
    sound = RANDOM.normal(size=31 * 16_000).astype(np.float32)
    features, heard = spectrograms(sound, 128)
    assert features.shape == (2, 128, 3000)
    assert torch.equal(features[:1], spectrograms(sound[:480_000], 128)[0])
    assert heard.sum(1).tolist() == [3000, 100]
    assert not spectrograms(np.zeros(0, np.float32), 128)[1].any()


# --- the processor


@pytest.mark.parametrize("word", ["<|video_pad|>", "<|audio_pad|>", "<|image_pad|>"])
def test_placeholders_in_a_question_are_an_error(processor: Any, word: str) -> None:
    with pytest.raises(MediaError, match="stands for media"):
        processor(processor.prompt(f"What is {word}?"), videos=FRAMES)


def test_prompts_are_padded_at_the_left(processor: Any) -> None:
    prompts = [processor.prompt(q) for q in ("Hi", "Hello there")]
    inputs = processor(prompts, videos=[FRAMES, FRAMES], audio=[None, SOUND])
    mask = inputs["attention_mask"]
    padded = int((mask[0] == 0).sum())
    assert padded == 60 + len("ello there") - 1
    assert not mask[0, :padded].any()
    assert mask[0, padded:].all()
    assert mask[1].all()
    alone = processor(prompts[0], videos=FRAMES)
    assert torch.equal(inputs["input_ids"][0, padded:], alone["input_ids"][0])
    assert torch.equal(inputs["position_ids"][:, 0, padded:], alone["position_ids"][:, 0])
    assert inputs["video_grid_thw"].tolist() == [[4, 4, 6]] * 2


def test_seconds_say_where_sound_goes(processor: Any) -> None:
    def runs(**options: Any) -> list[int]:
        ids = processor(processor.prompt("?"), videos=FRAMES, audio=SOUND, **options)["input_ids"][0]
        sounds = (ids == processor.media.audio_token_id).long()
        seen = ((ids == processor.media.video_token_id).cumsum(0) - 1) // 6
        return [int(sounds[seen == step].sum()) for step in range(4)]

    assert runs(seconds=4.0) == [2, 2, 2, 54]
    assert runs(seconds=8.0) == [4, 4, 4, 48]
    assert runs() == runs(seconds=0.8) == [0, 0, 1, 59]


def test_a_video_has_a_length(processor: Any) -> None:
    with pytest.raises(MediaError, match="more than 0 seconds"):
        processor(processor.prompt("?"), videos=FRAMES, seconds=0.0)


def test_the_position_rule_is_saved(tmp_path: Path) -> None:
    ours = FAMILY.processor(positions="dataset")
    ours.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.media == ours.media
    assert again.media.positions == "dataset"
    prompt = ours.prompt("What moves?")
    one, other = (p(prompt, videos=FRAMES, audio=SOUND, seconds=3.3) for p in (ours, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
