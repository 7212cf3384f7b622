"""What fastav knows about video-SALMONN 2: inputs and layouts of clips, dimensions, where things are."""

from typing import Any

import numpy as np
import pytest

from fastav.flops import paper_flops
from fastav.layout import Modality
from fastav.models.video_salmonn2 import (
    left_channel,
)
from support.native import VIDEO_SALMONN2 as FAMILY
from support.native import clip, requests

ADAPTER = FAMILY.adapter
RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (50, 40, 60, 3), dtype=np.uint8)  # 5 s at 10 frames a second
SOUND = RANDOM.uniform(-0.5, 0.5, 10 * 16_000).astype(np.float32)


@pytest.fixture(scope="module")
def processor() -> Any:
    return FAMILY.processor()


@pytest.fixture(scope="module")
def config() -> Any:
    return FAMILY.config()


def test_layout_of_video_with_sound(processor: Any) -> None:
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND)))
    layout = prepared.layouts[0]
    assert len(layout) == prepared.inputs["input_ids"].shape[1]
    video, audio, text = (layout.modality == m for m in (Modality.VIDEO, Modality.AUDIO, Modality.TEXT))
    assert layout.frame[video].tolist() == np.repeat(range(5), 20).tolist()
    assert layout.frame[audio].tolist() == np.repeat(range(5), 12).tolist()
    assert layout.frame[~text].tolist() == np.repeat(range(5), 32).tolist()  # interleaved
    assert layout.second[video].tolist() == np.repeat(range(5), 20).tolist()
    assert layout.second[audio][:10].tolist() == (np.arange(10) / 2).tolist()
    assert layout.padding[audio].tolist() == [False] * 10 + [True] * 50  # the sound is cut with the video
    assert layout.padding.sum() == 50
    assert np.isnan(layout.second[text | layout.padding]).all()
    assert (layout.frame[text] == -1).all()


def test_times_of_silent_frames_are_text(processor: Any) -> None:
    layout = ADAPTER.prepare(processor, requests(clip(FRAMES))).layouts[0]
    silent = len(processor.tokenizer(processor.prompt("What happens?", video=True).replace("<video>", ""))["input_ids"])
    assert layout.by_modality() == {"text": silent + 5 * 3, "video": 100}
    place = np.flatnonzero(layout.modality == Modality.VIDEO)
    assert (layout.modality[place[0] :][:115].reshape(5, 23)[:, 20:] == Modality.TEXT).all()
    assert not layout.padding.any()


def test_longer_sound_has_the_seconds_of_its_pieces(processor: Any) -> None:
    sound = np.zeros(40 * 16_000, np.float32)
    layout = ADAPTER.prepare(processor, requests(clip(sound=sound))).layouts[0]
    audio = layout.modality == Modality.AUDIO
    assert layout.second[audio][:80].tolist() == (np.arange(80) / 2).tolist()
    assert layout.padding[audio].tolist() == [False] * 80 + [True] * 40
    assert (layout.frame == -1).all()


def test_of_stereo_sound_the_left_channel_is_heard() -> None:
    level = np.round(SOUND * 32768) / 32768  # what 16 bits hold
    stereo = clip(sound=np.stack([level, np.zeros_like(level)]).astype(np.float32)).require_audio()
    alone = clip(sound=level.astype(np.float32)).require_audio()
    assert (left_channel(stereo, 50_000) == level[:50_000]).all()
    assert (left_channel(alone, 50_000) == level[:50_000]).all()
    assert len(left_channel(stereo, 10**6)) == len(SOUND)


def test_cutting_does_not_change_what_is_resampled() -> None:
    stereo = clip(sound=np.stack([SOUND, -SOUND]), rate=44_100).require_audio()
    whole, cut = left_channel(stereo, 10**6), left_channel(stereo, 20_000)
    assert (whole[:20_000] == cut).all()
    assert len(whole) == pytest.approx(len(SOUND) * 16_000 / 44_100, abs=64)


def test_clips_of_one_frame_are_seen(processor: Any) -> None:
    layout = ADAPTER.prepare(processor, requests(clip(FRAMES[:9], SOUND))).layouts[0]
    assert layout.by_modality() == {"text": layout.count(Modality.TEXT), "audio": 60, "video": 20}
    assert layout.padding.sum() == 60 - 2


def test_example_is_a_clip_of_ten_seconds() -> None:
    layout = ADAPTER.example(ADAPTER.config(), audio=None, video=None, text=34)
    assert layout.by_modality() == {"text": 34, "audio": 60, "video": 1820}
    assert layout.modality[:14].tolist() == [Modality.TEXT] * 14
    block = layout.frame[14:-20].reshape(10, 188)
    assert (block == np.arange(10)[:, None]).all()
    assert (layout.modality[14:-20].reshape(10, 188)[:, 182:] == Modality.AUDIO).all()
    assert layout.padding.sum() == 40
    assert layout.padding[layout.modality == Modality.AUDIO].tolist() == [False] * 20 + [True] * 40


@pytest.mark.parametrize("text", [34, 44, 60])
def test_preset_costs_what_the_paper_says(text: int) -> None:
    """The paper's table 1 says 58 of 100."""
    config = ADAPTER.config()
    layout, shape = ADAPTER.example(config, audio=None, video=None, text=text), ADAPTER.shape(config)
    tokens = ADAPTER.preset("fastav").tokens(layout, shape.layers)
    assert tokens[13:15] == (1880 + text, 4 * 188 + text)
    assert 0.57 < paper_flops(shape, tokens) / paper_flops(shape, [len(layout)] * shape.layers) < 0.59


def test_an_example_of_any_size_is_interleaved(config: Any) -> None:
    layout = ADAPTER.example(config, audio=10, video=50, text=0)
    assert layout.frame.tolist() == sorted(layout.frame.tolist())
    assert [int((layout.frame == i).sum()) for i in range(3)] == [20 + 4, 20 + 3, 10 + 3]
