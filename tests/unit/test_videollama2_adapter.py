"""What fastav knows about VideoLLaMA2: inputs and layouts of clips, dimensions, where things are."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from fastav.layout import Modality
from support.native import VIDEOLLAMA2 as FAMILY
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


def test_marks_that_are_no_whole_sound_are_not_told_its_padding(config: Any) -> None:
    scheme = config.scheme
    ids = torch.tensor([[scheme.audio_token_id] * (scheme.audio_tokens + 1)])
    heard = torch.zeros(1, scheme.fbank_rows, dtype=torch.bool)
    (layout,) = ADAPTER.layouts(config, {"input_ids": ids, "feature_attention_mask": heard})
    assert layout.count(Modality.AUDIO) == scheme.audio_tokens + 1
    assert not layout.padding.any()


def test_layout_of_video_with_sound(processor: Any) -> None:
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND)))
    layout, scheme = prepared.layouts[0], processor.media
    assert len(layout) == prepared.inputs["input_ids"].shape[1]
    video, audio, text = (layout.modality == m for m in (Modality.VIDEO, Modality.AUDIO, Modality.TEXT))
    assert layout.frame[video].tolist() == np.repeat([0, 2, 4, 6], scheme.pair_tokens).tolist()
    assert layout.second[video].tolist() == np.repeat(np.float32([0.3, 1.5, 2.8, 4.0]), scheme.pair_tokens).tolist()
    assert audio.sum() == 1496
    assert (np.flatnonzero(video)[-1] + 1) == np.flatnonzero(audio)[0]
    assert layout.padding.sum() == layout.padding[audio].sum() == 696
    assert not layout.padding[audio][:800].any()
    assert np.isnan(layout.second[text]).all()
    assert np.isnan(layout.second[layout.padding]).all()
    assert (layout.frame[~video] == -1).all()


def test_seconds_of_a_soundtrack_are_those_of_its_pieces(processor: Any) -> None:
    layout = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND))).layouts[0]
    seconds = layout.second[layout.modality == Modality.AUDIO][:800].reshape(100, 8)
    assert (seconds == seconds[:, :1]).all()  # a patch's frequencies sound at once
    heard = np.arange(100) * 0.16  # second in the joined pieces; a piece lasts 2 s and starts every (10 - 2) / 8 s
    assert seconds[:, 0] == pytest.approx(np.floor(heard / 2 + 1e-9) * 1.0 + np.mod(heard + 1e-9, 2), abs=1e-4)


def test_short_soundtracks_repeat(processor: Any) -> None:
    layout = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND[:16_000]))).layouts[0]
    seconds = layout.second[layout.modality == Modality.AUDIO]
    known = seconds[~np.isnan(seconds)]
    assert len(known) == 50 * 8  # 8 s of sound in patches of 0.16 s
    assert known.max() < 1


def test_sound_alone_is_the_first_channel_at_its_own_rate(processor: Any) -> None:
    stereo = np.stack([SOUND, np.zeros_like(SOUND)])
    prepared = ADAPTER.prepare(processor, requests(clip(sound=stereo, rate=8000)))
    alone = processor(processor.prompt("?", video=False, audio=True), audio=SOUND, sampling_rate=8000)
    assert torch.equal(prepared.inputs["input_features"], alone["input_features"])
    layout = prepared.layouts[0]
    seconds = layout.second[layout.modality == Modality.AUDIO]
    assert seconds[8] == pytest.approx(0.16)
    assert np.nanmax(seconds) == pytest.approx(0.16 * 124)  # 20 s are 125 patches
    assert layout.padding.sum() == 1496 - 125 * 8


def test_one_frame_repeats(processor: Any) -> None:
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES[:1])))
    pixels = prepared.inputs["pixel_values_videos"][0]
    assert (pixels == pixels[:1]).all()
    assert prepared.layouts[0].count(Modality.VIDEO) == 16


def test_example_of_the_release() -> None:
    layout = ADAPTER.example(ADAPTER.config(), audio=None, video=None, text=40)
    assert layout.by_modality() == {"text": 40, "audio": 1496, "video": 676}
    assert layout.padding.sum() == 696
    assert layout.modality[:14].tolist() == [Modality.TEXT] * 14
    assert layout.modality[14] == Modality.VIDEO
    assert layout.frame.max() == 6


# --- sound spread over the pairs of frames: not the release's, but of models that were trained so


def spread(config: Any) -> Any:
    """The configuration with this layout."""
    return type(config)(**{**config.to_dict(), "interleaved": True})


def test_spread_sound_follows_its_pair_of_frames(config: Any, processor: Any) -> None:
    apart = spread(config)
    reader = type(processor)(processor.tokenizer, scheme=asdict(apart.scheme))
    prepared = ADAPTER.prepare(reader, requests(clip(FRAMES, SOUND)))
    together = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND))).layouts[0]
    layout, scheme = prepared.layouts[0], reader.media
    video, audio = layout.modality == Modality.VIDEO, layout.modality == Modality.AUDIO
    runs = np.flatnonzero(np.diff(layout.modality[video | audio])) + 1
    assert len(runs) == 2 * 4 - 1  # of four pairs of frames
    lengths = np.diff([0, *runs, (video | audio).sum()]).tolist()
    assert lengths[::2] == [scheme.pair_tokens] * 4
    assert sum(lengths[1::2]) == scheme.audio_tokens
    assert max(lengths[1::2]) - min(lengths[1::2]) <= scheme.audio_grid[1]  # a patch's frequencies stay together
    assert layout.frame[audio].tolist() == np.repeat([0, 2, 4, 6], lengths[1::2]).tolist()
    for kind in (Modality.VIDEO, Modality.AUDIO):  # the tokens of a modality keep their order
        here, there = layout.modality == kind, together.modality == kind
        assert np.array_equal(layout.second[here], together.second[there], equal_nan=True)
        assert np.array_equal(layout.padding[here], together.padding[there])
        assert np.array_equal(layout.box[here], together.box[there], equal_nan=True)
    alike = ADAPTER.layouts(apart, prepared.inputs)[0]
    assert np.array_equal(alike.frame, layout.frame)
    example = ADAPTER.example(apart, text=layout.count(Modality.TEXT))
    assert np.array_equal(example.frame[example.modality != Modality.TEXT], layout.frame[video | audio])


def test_spread_sound_alone_and_frames_alone_are_as_before(config: Any) -> None:
    scheme = spread(config).scheme
    assert scheme.order(0, 24).tolist() == list(range(24))
    assert scheme.order(scheme.pair_tokens, 0).tolist() == list(range(scheme.pair_tokens))
    assert not config.scheme.interleaved
    assert config.scheme.order(3, 2).tolist() == [0, 1, 2, 3, 4]
