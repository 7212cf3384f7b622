"""What fastav knows about each of our own families: inputs and layouts of clips, dimensions, where things are."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2Config

from fastav.adapter import adapter_for
from fastav.errors import CheckpointError, MissingTrack
from fastav.layout import Modality
from fastav.media import Clip
from fastav.registry import MODELS
from fastav.request import Use
from support.native import (
    VIDEO_SALMONN2,
    VIDEO_SALMONN2_PLUS,
    VIDEOLLAMA2,
    Family,
    OtherProcessor,
    clip,
    each_family,
    requests,
)

pytestmark = each_family
RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (60, 56, 84, 3), dtype=np.uint8)  # 6 s at 10 frames a second
SOUND = RANDOM.uniform(-0.5, 0.5, 10 * 16_000).astype(np.float32)
BOTH, SILENT, ALONE = clip(FRAMES, SOUND), clip(FRAMES), clip(sound=SOUND)
CLIPS = {  # with other lengths and sizes, and sound alone where the family takes it
    VIDEOLLAMA2.name: (BOTH, SILENT, ALONE),
    VIDEO_SALMONN2.name: (BOTH, clip(FRAMES[:31]), ALONE, clip(FRAMES[:30], SOUND[:9000])),
    VIDEO_SALMONN2_PLUS.name: (BOTH, SILENT, clip(FRAMES[:, :28], SOUND)),
}
TOKENS = {VIDEOLLAMA2.name: (16, 1496), VIDEO_SALMONN2.name: (120, 60), VIDEO_SALMONN2_PLUS.name: (180, 60)}


@pytest.fixture(scope="module")
def processor(family: Family) -> Any:
    return family.processor()


@pytest.fixture(scope="module")
def config(family: Family) -> Any:
    return family.config()


def test_registry_finds_the_adapter(family: Family, config: Any) -> None:
    assert MODELS[family.name.replace("_", "-")] is type(family.adapter)
    for known in (config, family.adapter.config()):
        assert type(adapter_for(known.architectures)) is type(family.adapter)


@pytest.mark.parametrize("use", [Use.VIDEO, Use.AUDIO, Use.BOTH, Use.AUTO])
def test_request_says_which_tracks_are_shown(family: Family, processor: Any, use: Use) -> None:
    if use is Use.AUDIO and family is VIDEO_SALMONN2_PLUS:  # its own tests say how it refuses
        return
    prepared = family.adapter.prepare(processor, requests(BOTH, use=use))
    video, audio = TOKENS[family.name]
    wanted = (0 if use is Use.AUDIO else video, 0 if use is Use.VIDEO else audio)
    assert (prepared.layouts[0].count(Modality.VIDEO), prepared.layouts[0].count(Modality.AUDIO)) == wanted
    assert ("pixel_values_videos" in prepared.inputs) == (use != Use.AUDIO)
    assert ("input_features" in prepared.inputs) == (use != Use.VIDEO)


def test_layouts_need_only_what_forward_takes(family: Family, processor: Any, config: Any) -> None:
    clips = CLIPS[family.name]
    prepared = family.adapter.prepare(processor, requests(*clips))
    layouts = family.adapter.layouts(config, prepared.inputs)
    assert len(layouts) == len(clips)
    for ours, wanted, mask in zip(layouts, prepared.layouts, prepared.inputs["attention_mask"], strict=True):
        assert len(ours) == int(mask.sum())
        for name in ("modality", "frame", "padding"):
            assert getattr(ours, name).tolist() == getattr(wanted, name).tolist()
        assert np.isnan(ours.second).all()
    if family is VIDEO_SALMONN2:
        assert layouts[3].padding.sum() == 60 - 2
    (unknown,) = family.adapter.layouts(config, {"input_ids": prepared.inputs["input_ids"][:1]})
    assert not unknown.padding.any()
    if family is VIDEO_SALMONN2_PLUS:  # whose steps have as many tokens as the frames' size gives
        assert (unknown.frame == -1).all()


def test_prepared_clips_run(family: Family, processor: Any) -> None:
    prepared = family.adapter.prepare(processor, requests(*CLIPS[family.name]))
    with torch.no_grad():
        assert family.model()(**prepared.inputs, logits_to_keep=1).logits.isfinite().all()


def test_others_processors_and_configurations_are_refused(family: Family) -> None:
    with pytest.raises(CheckpointError, match=f"needs a {family.processor_class.__name__}, got OtherProcessor"):
        family.adapter.prepare(OtherProcessor(), requests(SILENT))
    stock = Qwen2_5_VLConfig if family is VIDEO_SALMONN2_PLUS else Qwen2Config  # as the release's config.json says
    for use in (family.adapter.build, lambda config: family.adapter.layouts(config, {})):
        for other in {Qwen2Config, stock}:
            with pytest.raises(CheckpointError, match=f"needs a {family.config_class.__name__}, got {other.__name__}"):
                use(other())


def test_clip_without_tracks_is_refused(family: Family, processor: Any) -> None:
    message = "without video" if family is VIDEO_SALMONN2_PLUS else "neither"
    with pytest.raises(MissingTrack, match=message):
        family.adapter.prepare(processor, requests(Clip(name="nothing", video=None, audio=None)))


def test_example_may_lack_anything(family: Family, config: Any) -> None:
    example = family.adapter.example
    assert example(config, audio=0, video=0, text=3).by_modality() == {"text": 3}
    layout = example(config, audio=10, video=50, text=0)
    assert layout.by_modality() == {"audio": 10, "video": 50}
    assert not layout.padding.any()
    assert (example(config, audio=10, video=0, text=3).frame == -1).all()


def test_dimensions_of_the_release(family: Family) -> None:
    shape = family.adapter.shape(family.adapter.config())
    assert (shape.layers, shape.hidden, shape.intermediate) == (28, 3584, 18_944)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab) == (28, 4, 128, 152_064)


def test_decoder_and_encoders_are_the_whole_model(family: Family, config: Any) -> None:
    with torch.device("meta"):
        model = family.model_class(config)
    decoder, encoders = family.adapter.decoder(model), family.adapter.encoders(model)
    assert decoder is model.get_decoder()
    assert len(decoder.layers) == config.get_text_config(decoder=True).num_hidden_layers
    named = [p for module in encoders for p in module.parameters()]
    own = [*decoder.layers.parameters(), *decoder.norm.parameters(), *decoder.embed_tokens.parameters()]
    bare = [model.model.image_newline, model.speech_query_tokens] if family is VIDEO_SALMONN2 else []
    assert sum(p.numel() for p in [*named, *own, *bare, *model.lm_head.parameters()]) == model.num_parameters()
