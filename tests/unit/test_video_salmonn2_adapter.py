"""What fastav knows about video-SALMONN 2: inputs and layouts of clips, dimensions, where things are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ProcessorMixin, Qwen2Config

from fastav.adapter import Request, Use, adapter_for
from fastav.errors import CheckpointError, MissingTrack
from fastav.flops import paper_flops
from fastav.layout import Modality
from fastav.media import Clip
from fastav.models.video_salmonn2 import (
    VideoSalmonn2Adapter,
    VideoSalmonn2Config,
    VideoSalmonn2ForConditionalGeneration,
    VideoSalmonn2Processor,
    left_channel,
)
from fastav.registry import MODELS

TINY = Path(__file__).parents[1] / "reference" / "video_salmonn2"
ADAPTER = VideoSalmonn2Adapter()
RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (50, 40, 60, 3), dtype=np.uint8)  # 5 s at 10 frames a second
SOUND = RANDOM.uniform(-0.5, 0.5, 10 * 16_000).astype(np.float32)


@pytest.fixture(scope="module")
def processor() -> VideoSalmonn2Processor:
    return VideoSalmonn2Processor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def config() -> VideoSalmonn2Config:
    return ADAPTER.config(str(TINY))


def clip(frames: Any = None, sound: Any = None, rate: int = 16_000) -> Clip:
    return Clip.from_arrays(frames=frames, fps=10.0, waveform=sound, sample_rate=None if sound is None else rate)


def requests(*clips: Clip, use: Use = Use.AUTO) -> list[Request]:
    return [Request(clip=one, question="What happens?" * (i + 1), use=use) for i, one in enumerate(clips)]


def test_registry_finds_the_adapter(config: VideoSalmonn2Config) -> None:
    assert MODELS["video-salmonn2"] is VideoSalmonn2Adapter
    assert isinstance(adapter_for(config.architectures), VideoSalmonn2Adapter)
    assert isinstance(adapter_for(ADAPTER.config().architectures), VideoSalmonn2Adapter)


def test_layout_of_video_with_sound(processor: VideoSalmonn2Processor) -> None:
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


def test_times_of_silent_frames_are_text(processor: VideoSalmonn2Processor) -> None:
    layout = ADAPTER.prepare(processor, requests(clip(FRAMES))).layouts[0]
    silent = len(processor.tokenizer(processor.prompt("What happens?", video=True).replace("<video>", ""))["input_ids"])
    assert layout.by_modality() == {"text": silent + 5 * 3, "video": 100}
    place = np.flatnonzero(layout.modality == Modality.VIDEO)
    assert (layout.modality[place[0] :][:115].reshape(5, 23)[:, 20:] == Modality.TEXT).all()
    assert not layout.padding.any()


def test_longer_sound_has_the_seconds_of_its_pieces(processor: VideoSalmonn2Processor) -> None:
    sound = np.zeros(40 * 16_000, np.float32)
    layout = ADAPTER.prepare(processor, requests(clip(sound=sound))).layouts[0]
    audio = layout.modality == Modality.AUDIO
    assert layout.second[audio][:80].tolist() == (np.arange(80) / 2).tolist()
    assert layout.padding[audio].tolist() == [False] * 80 + [True] * 40
    assert (layout.frame == -1).all()


@pytest.mark.parametrize(
    ("use", "video", "audio"), [(Use.VIDEO, 100, 0), (Use.AUDIO, 0, 60), (Use.BOTH, 100, 60), (Use.AUTO, 100, 60)]
)
def test_request_says_which_tracks_are_shown(
    processor: VideoSalmonn2Processor, use: Use, video: int, audio: int
) -> None:
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND), use=use))
    layout = prepared.layouts[0]
    assert (layout.count(Modality.VIDEO), layout.count(Modality.AUDIO)) == (video, audio)
    assert ("pixel_values_videos" in prepared.inputs) == (use != Use.AUDIO)
    assert ("input_features" in prepared.inputs) == (use != Use.VIDEO)


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


def test_layouts_need_only_what_forward_takes(processor: VideoSalmonn2Processor, config: VideoSalmonn2Config) -> None:
    clips = clip(FRAMES, SOUND), clip(FRAMES[:31]), clip(sound=SOUND), clip(FRAMES[:30], SOUND[:9000])
    prepared = ADAPTER.prepare(processor, requests(*clips))
    layouts = ADAPTER.layouts(config, prepared.inputs)
    assert len(layouts) == 4
    for ours, wanted, mask in zip(layouts, prepared.layouts, prepared.inputs["attention_mask"], strict=True):
        assert len(ours) == int(mask.sum())
        for name in ("modality", "frame", "padding"):
            assert getattr(ours, name).tolist() == getattr(wanted, name).tolist()
        assert np.isnan(ours.second).all()
    assert layouts[3].padding.sum() == 60 - 2
    unknown = {"input_ids": prepared.inputs["input_ids"][:1]}
    assert not ADAPTER.layouts(config, unknown)[0].padding.any()


def test_clips_of_one_frame_are_seen(processor: VideoSalmonn2Processor) -> None:
    layout = ADAPTER.prepare(processor, requests(clip(FRAMES[:9], SOUND))).layouts[0]
    assert layout.by_modality() == {"text": layout.count(Modality.TEXT), "audio": 60, "video": 20}
    assert layout.padding.sum() == 60 - 2


def test_prepared_clips_run(processor: VideoSalmonn2Processor) -> None:
    model, _ = ADAPTER.load(str(TINY), dtype=torch.float32)
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND), clip(sound=SOUND), clip(FRAMES)))
    with torch.no_grad():
        assert model(**prepared.inputs, logits_to_keep=1).logits.isfinite().all()


def test_other_processors_are_refused() -> None:
    class Other(ProcessorMixin):
        def __init__(self) -> None: ...

    with pytest.raises(CheckpointError, match="needs a VideoSalmonn2Processor, got Other"):
        ADAPTER.prepare(Other(), requests(clip(FRAMES)))


def test_other_configurations_are_refused() -> None:
    with pytest.raises(CheckpointError, match="got Qwen2Config"):
        ADAPTER.layouts(Qwen2Config(), {})


def test_clip_without_tracks_is_refused(processor: VideoSalmonn2Processor) -> None:
    with pytest.raises(MissingTrack, match="neither"):
        ADAPTER.prepare(processor, requests(Clip(name="nothing", video=None, audio=None)))


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


def test_example_may_lack_anything(config: VideoSalmonn2Config) -> None:
    assert ADAPTER.example(config, audio=0, video=0, text=3).by_modality() == {"text": 3}
    layout = ADAPTER.example(config, audio=10, video=50, text=0)
    assert layout.by_modality() == {"audio": 10, "video": 50}
    assert layout.frame.tolist() == sorted(layout.frame.tolist())
    assert [int((layout.frame == i).sum()) for i in range(3)] == [20 + 4, 20 + 3, 10 + 3]
    assert not layout.padding.any()
    assert (ADAPTER.example(config, audio=10, video=0, text=0).frame == -1).all()


def test_dimensions_of_the_release() -> None:
    shape = ADAPTER.shape(ADAPTER.config())
    assert (shape.layers, shape.hidden, shape.intermediate) == (28, 3584, 18_944)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab) == (28, 4, 128, 152_064)


def test_decoder_and_encoders_are_the_whole_model(config: VideoSalmonn2Config) -> None:
    with torch.device("meta"):
        model = VideoSalmonn2ForConditionalGeneration(config)
    decoder, encoders = ADAPTER.decoder(model), ADAPTER.encoders(model)
    assert len(decoder.layers) == config.num_hidden_layers
    named = [p for module in encoders for p in module.parameters()]
    own = [*decoder.layers.parameters(), *decoder.norm.parameters(), *decoder.embed_tokens.parameters()]
    bare = [model.model.image_newline, model.speech_query_tokens]
    assert sum(p.numel() for p in [*named, *own, *bare, *model.lm_head.parameters()]) == model.num_parameters()
