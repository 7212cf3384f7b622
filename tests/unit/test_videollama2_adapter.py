"""What fastav knows about VideoLLaMA2: inputs and layouts of clips, dimensions, where things are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ProcessorMixin, Qwen2Config

from fastav.adapter import Request, Use, adapter_for
from fastav.errors import CheckpointError, MissingTrack
from fastav.layout import Modality
from fastav.media import Clip
from fastav.models.videollama2 import (
    VideoLlama2Adapter,
    VideoLlama2Config,
    VideoLlama2ForConditionalGeneration,
    VideoLlama2Processor,
)
from fastav.registry import MODELS

TINY = Path(__file__).parents[1] / "reference" / "videollama2"
ADAPTER = VideoLlama2Adapter()
RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (50, 40, 60, 3), dtype=np.uint8)  # 5 s at 10 frames a second
SOUND = RANDOM.uniform(-0.5, 0.5, 10 * 16_000).astype(np.float32)


@pytest.fixture(scope="module")
def processor() -> VideoLlama2Processor:
    return VideoLlama2Processor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def config() -> VideoLlama2Config:
    return ADAPTER.config(str(TINY))


def clip(frames: Any = None, sound: Any = None, rate: int = 16_000) -> Clip:
    return Clip.from_arrays(frames=frames, fps=10.0, waveform=sound, sample_rate=None if sound is None else rate)


def requests(*clips: Clip, use: Use = Use.AUTO) -> list[Request]:
    return [Request(clip=one, question="What happens?" * (i + 1), use=use) for i, one in enumerate(clips)]


def test_registry_finds_the_adapter(config: VideoLlama2Config) -> None:
    assert MODELS["videollama2"] is VideoLlama2Adapter
    assert isinstance(adapter_for(config.architectures), VideoLlama2Adapter)
    assert isinstance(adapter_for(ADAPTER.config().architectures), VideoLlama2Adapter)


def test_marks_that_are_no_whole_sound_are_not_told_its_padding(config: VideoLlama2Config) -> None:
    scheme = config.scheme
    ids = torch.tensor([[scheme.audio_token_id] * (scheme.audio_tokens + 1)])
    heard = torch.zeros(1, scheme.fbank_rows, dtype=torch.bool)
    (layout,) = ADAPTER.layouts(config, {"input_ids": ids, "feature_attention_mask": heard})
    assert layout.count(Modality.AUDIO) == scheme.audio_tokens + 1
    assert not layout.padding.any()


def test_layout_of_video_with_sound(processor: VideoLlama2Processor) -> None:
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


def test_seconds_of_a_soundtrack_are_those_of_its_pieces(processor: VideoLlama2Processor) -> None:
    layout = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND))).layouts[0]
    seconds = layout.second[layout.modality == Modality.AUDIO][:800].reshape(100, 8)
    assert (seconds == seconds[:, :1]).all()  # a patch's frequencies sound at once
    heard = np.arange(100) * 0.16  # second in the joined pieces; a piece lasts 2 s and starts every (10 - 2) / 8 s
    assert seconds[:, 0] == pytest.approx(np.floor(heard / 2 + 1e-9) * 1.0 + np.mod(heard + 1e-9, 2), abs=1e-4)


def test_short_soundtracks_repeat(processor: VideoLlama2Processor) -> None:
    layout = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND[:16_000]))).layouts[0]
    seconds = layout.second[layout.modality == Modality.AUDIO]
    known = seconds[~np.isnan(seconds)]
    assert len(known) == 50 * 8  # 8 s of sound in patches of 0.16 s
    assert known.max() < 1


@pytest.mark.parametrize(("use", "tokens"), [(Use.VIDEO, 16), (Use.AUDIO, 1496), (Use.BOTH, 1512), (Use.AUTO, 1512)])
def test_request_says_which_tracks_are_shown(processor: VideoLlama2Processor, use: Use, tokens: int) -> None:
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND), use=use))
    layout = prepared.layouts[0]
    assert layout.count(Modality.VIDEO, Modality.AUDIO) == tokens
    assert ("pixel_values_videos" in prepared.inputs) == (use != Use.AUDIO)
    assert ("input_features" in prepared.inputs) == (use != Use.VIDEO)


def test_sound_alone_is_the_first_channel_at_its_own_rate(processor: VideoLlama2Processor) -> None:
    stereo = np.stack([SOUND, np.zeros_like(SOUND)])
    prepared = ADAPTER.prepare(processor, requests(clip(sound=stereo, rate=8000)))
    alone = processor(processor.prompt("?", video=False, audio=True), audio=SOUND, sampling_rate=8000)
    assert torch.equal(prepared.inputs["input_features"], alone["input_features"])
    layout = prepared.layouts[0]
    seconds = layout.second[layout.modality == Modality.AUDIO]
    assert seconds[8] == pytest.approx(0.16)
    assert np.nanmax(seconds) == pytest.approx(0.16 * 124)  # 20 s are 125 patches
    assert layout.padding.sum() == 1496 - 125 * 8


def test_layouts_need_only_what_forward_takes(processor: VideoLlama2Processor, config: VideoLlama2Config) -> None:
    clips = clip(FRAMES, SOUND), clip(FRAMES), clip(sound=SOUND)
    prepared = ADAPTER.prepare(processor, requests(*clips))
    layouts = ADAPTER.layouts(config, prepared.inputs)
    assert len(layouts) == 3
    for ours, wanted, mask in zip(layouts, prepared.layouts, prepared.inputs["attention_mask"], strict=True):
        assert len(ours) == int(mask.sum())
        for name in ("modality", "frame", "padding"):
            assert getattr(ours, name).tolist() == getattr(wanted, name).tolist()
        assert np.isnan(ours.second).all()
    unknown = {"input_ids": prepared.inputs["input_ids"][:1]}
    assert not ADAPTER.layouts(config, unknown)[0].padding.any()


def test_one_frame_repeats(processor: VideoLlama2Processor) -> None:
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES[:1])))
    pixels = prepared.inputs["pixel_values_videos"][0]
    assert (pixels == pixels[:1]).all()
    assert prepared.layouts[0].count(Modality.VIDEO) == 16


def test_prepared_clips_run(processor: VideoLlama2Processor) -> None:
    model, _ = ADAPTER.load(str(TINY), dtype=torch.float32)
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND), clip(sound=SOUND)))
    with torch.no_grad():
        assert model(**prepared.inputs, logits_to_keep=1).logits.isfinite().all()


def test_other_processors_are_refused() -> None:
    class Other(ProcessorMixin):
        def __init__(self) -> None: ...

    with pytest.raises(CheckpointError, match="needs a VideoLlama2Processor, got Other"):
        ADAPTER.prepare(Other(), requests(clip(FRAMES)))


def test_other_configurations_are_refused() -> None:
    with pytest.raises(CheckpointError, match="got Qwen2Config"):
        ADAPTER.layouts(Qwen2Config(), {})


def test_clip_without_tracks_is_refused(processor: VideoLlama2Processor) -> None:
    with pytest.raises(MissingTrack, match="neither"):
        ADAPTER.prepare(processor, requests(Clip(name="nothing", video=None, audio=None)))


def test_example_of_the_release() -> None:
    layout = ADAPTER.example(ADAPTER.config(), audio=None, video=None, text=40)
    assert layout.by_modality() == {"text": 40, "audio": 1496, "video": 676}
    assert layout.padding.sum() == 696
    assert layout.modality[:14].tolist() == [Modality.TEXT] * 14
    assert layout.modality[14] == Modality.VIDEO
    assert layout.frame.max() == 6


def test_example_may_lack_anything(config: VideoLlama2Config) -> None:
    assert ADAPTER.example(config, audio=0, video=0, text=3).by_modality() == {"text": 3}
    layout = ADAPTER.example(config, audio=10, video=20, text=0)
    assert layout.by_modality() == {"audio": 10, "video": 20}
    assert not layout.padding.any()


def test_dimensions_of_the_release() -> None:
    shape = ADAPTER.shape(ADAPTER.config())
    assert (shape.layers, shape.hidden, shape.intermediate) == (28, 3584, 18_944)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab) == (28, 4, 128, 152_064)


def test_decoder_and_encoders_are_the_whole_model(config: VideoLlama2Config) -> None:
    with torch.device("meta"):
        model = VideoLlama2ForConditionalGeneration(config)
    decoder, encoders = ADAPTER.decoder(model), ADAPTER.encoders(model)
    assert len(decoder.layers) == config.num_hidden_layers
    named = [p for module in encoders for p in module.parameters()]
    own = [*decoder.layers.parameters(), *decoder.norm.parameters(), *decoder.embed_tokens.parameters()]
    assert sum(p.numel() for p in [*named, *own, *model.lm_head.parameters()]) == model.num_parameters()
