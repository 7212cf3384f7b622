"""What fastav knows about video-SALMONN 2+: inputs and layouts of clips, dimensions, where things are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ProcessorMixin, Qwen2_5_VLConfig

from fastav.adapter import Request, Use, adapter_for
from fastav.errors import CheckpointError, MissingTrack
from fastav.layout import Modality
from fastav.media import Clip
from fastav.models.video_salmonn2_plus import (
    VideoSalmonn2PlusAdapter,
    VideoSalmonn2PlusConfig,
    VideoSalmonn2PlusForConditionalGeneration,
    VideoSalmonn2PlusProcessor,
)
from fastav.registry import MODELS

TINY = Path(__file__).parents[1] / "reference" / "video_salmonn2_plus"
ADAPTER = VideoSalmonn2PlusAdapter()
RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (60, 56, 84, 3), dtype=np.uint8)  # 6 s at 10 frames a second, 2 x 3 tokens
SOUND = RANDOM.uniform(-0.5, 0.5, 5 * 16_000).astype(np.float32)


@pytest.fixture(scope="module")
def processor() -> VideoSalmonn2PlusProcessor:
    return VideoSalmonn2PlusProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def config() -> VideoSalmonn2PlusConfig:
    return ADAPTER.config(str(TINY))


def clip(frames: Any = None, sound: Any = None) -> Clip:
    return Clip.from_arrays(frames=frames, fps=10.0, waveform=sound, sample_rate=None if sound is None else 16_000)


def requests(*clips: Clip, use: Use = Use.AUTO) -> list[Request]:
    return [Request(clip=one, question="What happens?" * (i + 1), use=use) for i, one in enumerate(clips)]


def test_registry_finds_the_adapter(config: VideoSalmonn2PlusConfig) -> None:
    assert MODELS["video-salmonn2-plus"] is VideoSalmonn2PlusAdapter
    assert isinstance(adapter_for(config.architectures), VideoSalmonn2PlusAdapter)
    assert isinstance(adapter_for(ADAPTER.config().architectures), VideoSalmonn2PlusAdapter)


def test_layout_of_video_with_sound(processor: VideoSalmonn2PlusProcessor) -> None:
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND)))
    layout = prepared.layouts[0]
    assert len(layout) == prepared.inputs["input_ids"].shape[1]
    video, audio, text = (layout.modality == m for m in (Modality.VIDEO, Modality.AUDIO, Modality.TEXT))
    assert prepared.inputs["video_grid_thw"].tolist() == [[30, 4, 6]]
    assert layout.frame[video].tolist() == np.repeat(np.arange(0, 60, 2), 6).tolist()
    assert layout.second[video] == pytest.approx(np.repeat(np.arange(30) * 0.2, 6))
    assert audio.sum() == 60
    # a step lasts 0.2 s, a sound token half a second: the first one follows the third step, whose sampled frame is 4
    follows = layout.frame[audio]
    wanted = [2 * next(s for s in range(30) if (s + 1) * 0.4 + 1e-9 >= i + 1) for i in range(11)]
    assert follows[:11].tolist() == wanted
    assert (follows[11:] == 58).all()
    assert layout.padding[audio].tolist() == [False] * 10 + [True] * 50
    assert layout.second[audio][:10].tolist() == [i / 2 for i in range(10)]
    assert np.isnan(layout.second[audio][10:]).all()
    assert not layout.padding[video].any()
    assert np.isnan(layout.second[text]).all()
    assert (layout.frame[text] == -1).all()


def test_long_sound_has_pieces_and_short_sound_may_end_before_the_picture(
    processor: VideoSalmonn2PlusProcessor,
) -> None:
    long = RANDOM.uniform(-0.5, 0.5, 31 * 16_000 + 1).astype(np.float32)
    frames = np.repeat(FRAMES, 11, axis=0)  # 66 s
    for sound, heard in ((long, 63), (SOUND, 10)):
        layout = ADAPTER.prepare(processor, requests(clip(frames, sound))).layouts[0]
        audio = layout.modality == Modality.AUDIO
        assert audio.sum() == 60 * -(-heard // 60)
        assert (~layout.padding[audio]).sum() == heard
        assert not layout.padding[audio][:heard].any()


@pytest.mark.parametrize(("use", "audio"), [(Use.VIDEO, 0), (Use.BOTH, 60), (Use.AUTO, 60)])
def test_request_says_which_tracks_are_shown(processor: VideoSalmonn2PlusProcessor, use: Use, audio: int) -> None:
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND), use=use))
    assert prepared.layouts[0].count(Modality.VIDEO) == 180
    assert prepared.layouts[0].count(Modality.AUDIO) == audio
    assert ("input_features" in prepared.inputs) == bool(audio)


@pytest.mark.parametrize(("one", "use"), [(clip(sound=SOUND), Use.AUTO), (clip(FRAMES, SOUND), Use.AUDIO)])
def test_sound_alone_is_refused(processor: VideoSalmonn2PlusProcessor, one: Clip, use: Use) -> None:
    with pytest.raises(MissingTrack, match="only along with a picture"):
        ADAPTER.prepare(processor, requests(one, use=use))


def test_layouts_need_only_what_forward_takes(
    processor: VideoSalmonn2PlusProcessor, config: VideoSalmonn2PlusConfig
) -> None:
    clips = clip(FRAMES, SOUND), clip(FRAMES), clip(FRAMES[:, :28], SOUND)
    prepared = ADAPTER.prepare(processor, requests(*clips))
    layouts = ADAPTER.layouts(config, prepared.inputs)
    assert len(layouts) == 3
    for ours, wanted, mask in zip(layouts, prepared.layouts, prepared.inputs["attention_mask"], strict=True):
        assert len(ours) == int(mask.sum())
        for name in ("modality", "frame", "padding"):
            assert getattr(ours, name).tolist() == getattr(wanted, name).tolist()
        assert np.isnan(ours.second).all()
    unknown = ADAPTER.layouts(config, {"input_ids": prepared.inputs["input_ids"][:1]})[0]
    assert not unknown.padding.any()
    assert (unknown.frame == -1).all()


def test_one_frame_repeats(processor: VideoSalmonn2PlusProcessor) -> None:
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES[:1])))
    pixels = prepared.inputs["pixel_values_videos"].reshape(8, 24, 3, 2, 14, 14)
    assert (pixels == pixels[:1, :, :, :1]).all()


def test_prepared_clips_run(processor: VideoSalmonn2PlusProcessor) -> None:
    model, _ = ADAPTER.load(str(TINY), dtype=torch.float32)
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND), clip(FRAMES)))
    with torch.no_grad():
        assert model(**prepared.inputs, logits_to_keep=1).logits.isfinite().all()


def test_other_processors_are_refused() -> None:
    class Other(ProcessorMixin):
        def __init__(self) -> None: ...

    with pytest.raises(CheckpointError, match="needs a VideoSalmonn2PlusProcessor, got Other"):
        ADAPTER.prepare(Other(), requests(clip(FRAMES)))


def test_other_configurations_are_refused() -> None:
    with pytest.raises(CheckpointError, match="got Qwen2_5_VLConfig"):
        ADAPTER.layouts(Qwen2_5_VLConfig(), {})


def test_clip_without_tracks_is_refused(processor: VideoSalmonn2PlusProcessor) -> None:
    with pytest.raises(MissingTrack, match="without video"):
        ADAPTER.prepare(processor, requests(Clip(name="nothing", video=None, audio=None)))


def test_example_of_the_release() -> None:
    layout = ADAPTER.example(ADAPTER.config(), audio=None, video=None, text=40)
    assert layout.by_modality() == {"text": 40, "audio": 120, "video": 200 * 8 * 15}
    assert layout.padding.sum() == 40
    assert layout.modality[:15].tolist() == [Modality.TEXT] * 15
    assert layout.modality[15] == Modality.VIDEO
    assert layout.frame.max() == 398
    assert (layout.frame[layout.padding] == 398).all()


def test_example_may_lack_anything(config: VideoSalmonn2PlusConfig) -> None:
    assert ADAPTER.example(config, audio=0, video=0, text=3).by_modality() == {"text": 3}
    assert (ADAPTER.example(config, audio=9, video=0, text=3).frame == -1).all()
    layout = ADAPTER.example(config, audio=10, video=20, text=0)
    assert layout.by_modality() == {"audio": 10, "video": 20}
    assert not layout.padding.any()


def test_dimensions_of_the_release() -> None:
    shape = ADAPTER.shape(ADAPTER.config())
    assert (shape.layers, shape.hidden, shape.intermediate) == (28, 3584, 18_944)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab) == (28, 4, 128, 152_064)


def test_decoder_and_encoders_are_the_whole_model(config: VideoSalmonn2PlusConfig) -> None:
    with torch.device("meta"):
        model = VideoSalmonn2PlusForConditionalGeneration(config)
    decoder, encoders = ADAPTER.decoder(model), ADAPTER.encoders(model)
    assert decoder is model.get_decoder()
    assert len(decoder.layers) == config.text_config.num_hidden_layers
    named = [p for module in encoders for p in module.parameters()]
    own = [*decoder.layers.parameters(), *decoder.norm.parameters(), *decoder.embed_tokens.parameters()]
    assert sum(p.numel() for p in [*named, *own, *model.lm_head.parameters()]) == model.num_parameters()
