"""Checkpoints of our own families: the originals' formats and ours, whole or damaged."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

import support.native as native
from fastav.errors import CheckpointError, UnsupportedModel
from fastav.models.videollama2 import soundtrack_features
from support.native import (
    VIDEO_SALMONN2,
    VIDEO_SALMONN2_PLUS,
    VIDEOLLAMA2,
    Family,
    assert_same_weights,
    each_family,
    without,
)

pytestmark = each_family
VL2, S2, PLUS = VIDEOLLAMA2, VIDEO_SALMONN2, VIDEO_SALMONN2_PLUS
NEVER_READ = "audio.qformer.bert.embeddings.position_ids"  # 0, 1, 2, ...: saved by old versions of BERT
AUTO = {PLUS.name: {"model_type": "video_salmonn2_plus"}}  # its original's config.json says stock Qwen2.5-VL
OTHERS = {  # what makes a config.json another model's
    VL2.name: ({"model_type": "qwen2"}, "of a qwen2 model"),
    S2.name: ({"model_type": "qwen2"}, "of a qwen2 model"),
    PLUS.name: ({"audio_config": None}, "of a qwen2_5_vl model"),
}

MISSING = {
    VL2.name: (
        "model.layers.2.mlp.up_proj.weight",
        "model.audio_tower.encoder.pos_conv.0.weight_g",
        "model.audio_tower.predictor.bias",
        "model.mm_projector.s2.b3.se.fc1.weight",
        "model.vision_tower.vision_tower.vision_model.head.probe",
        "lm_head.weight",
    ),
    S2.name: (
        "model.layers.2.mlp.up_proj.weight",
        "model.image_newline",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
        "speech_query_tokens",
        "speech_encoder.embed_positions.weight",
        "speech_Qformer.bert.encoder.layer.1.crossattention.self.key.weight",
        "final_linear.2.bias",
        "lm_head.weight",
    ),
    PLUS.name: (
        "model.layers.2.mlp.up_proj.weight",
        "visual.merger.ln_q.weight",
        "audio.conv1.bias",
        "audio.q_tokens",
        "audio.qformer.bert.encoder.layer.1.crossattention.self.key.weight",
        "lm_head.weight",
    ),
}
PLUS_AUDIO = json.loads((PLUS.tiny / "config.json").read_text())["audio_config"]
OTHER_KINDS: dict[str, tuple[tuple[dict[str, Any], str], ...]] = {  # changes of config.json, what the error names
    VL2.name: tuple(
        ({key: "linear"}, key) for key in ("mm_projector_type", "mm_projector_a_type", "mm_vision_select_feature")
    ),
    S2.name: (
        *(
            ({"model_args": {key: "other"}}, key)
            for key in ("mm_spatial_pool_mode", "mm_pooling_position", "mm_newline_position")
        ),
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
    ),
    PLUS.name: (
        ({"audio_config": PLUS_AUDIO | {"second_stride": 0.25}}, "second_stride"),
        ({"audio_config": PLUS_AUDIO | {"qformer_config": {"query_length": 2}}}, "query_length"),
    ),
}


@pytest.fixture(scope="module")
def tiny(family: Family) -> Any:
    return family.model()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def variant(family: Family, tmp_path: Path) -> Callable[..., Path]:
    return lambda change=None, **config: native.variant(family, tmp_path, change, **config)


def inputs_of(family: Family, config: Any) -> dict[str, Any]:
    """A prompt with video and sound, of random numbers."""
    generator, scheme = torch.Generator().manual_seed(0), config.scheme
    if family is PLUS:
        return {
            "input_ids": torch.tensor([[1, 259, *[262] * 6, *[263] * 60, 260, 2]]),
            "pixel_values_videos": torch.randn(24, 1176, generator=generator),
            "video_grid_thw": torch.tensor([[1, 4, 6]]),
            "input_features": torch.randn(1, 128, 3000, generator=generator),
        }
    size = (3, scheme.image_size, scheme.image_size)
    if family is VL2:
        video, audio = scheme.video_tokens(4), scheme.audio_tokens
        pixels = torch.rand(1, 4, *size, generator=generator)
        features = soundtrack_features(torch.rand(50_000, generator=generator).numpy() - 0.5, scheme)[0][None]
    else:
        video, audio = scheme.frame_tokens * 2, scheme.piece_tokens
        pixels = torch.rand(2, *size, generator=generator) * 2 - 1
        features = torch.rand(1, scheme.mel_bins, 3000, generator=generator)
    ids = torch.tensor([[1, 2, *[scheme.video_token_id] * video, *[scheme.audio_token_id] * audio, 3]])
    return {"input_ids": ids, "pixel_values_videos": pixels, "input_features": features, "logits_to_keep": 20}


@torch.no_grad()
def logits(family: Family, model: Any) -> torch.Tensor:
    return model(**inputs_of(family, model.config)).logits


def names(folder: Path) -> set[str]:
    """The names of the weights in a checkpoint of one file."""
    return set(load_file(folder / "model.safetensors"))


def test_saving_and_loading_changes_nothing(family: Family, tiny: Any, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)  # nothing of what the originals keep beside the weights
    again = family.model_class.from_pretrained(tmp_path)
    assert_same_weights(again, tiny)
    ours, other = logits(family, again), logits(family, tiny)
    if family is VL2:  # weights are equal; kernels round by alignment
        assert (ours - other).abs().max() < 1e-4
    else:
        assert torch.equal(ours, other)
    assert names(tmp_path) == names(family.tiny) - {NEVER_READ}
    ours, other = again.config.to_dict(), tiny.config.to_dict()
    assert {key for key in ours | other if ours[key] != other[key]} <= {"architectures", "_name_or_path"}


def test_model_made_from_a_configuration_saves_the_originals_names(family: Family, tiny: Any, tmp_path: Path) -> None:
    fresh = family.model_class(tiny.config)
    fresh.save_pretrained(tmp_path)
    assert names(tmp_path) == names(family.tiny) - {NEVER_READ}
    assert_same_weights(family.model(family.with_tokenizer(tmp_path)), fresh)


def test_fresh_weights_are_finite_and_reproducible(family: Family, tiny: Any) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(family.model_class(tiny.config).eval())
    assert_same_weights(*models)
    assert logits(family, models[0]).isfinite().all()


def test_sharded_checkpoint_loads_and_a_missing_shard_is_an_error(family: Family, tiny: Any, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(family.model(family.with_tokenizer(tmp_path)), tiny)
    min(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of"):
        family.model(tmp_path)


def test_damaged_index_is_an_error(family: Family, tiny: Any, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="300KB")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {')
    with pytest.raises(CheckpointError, match="damaged"):
        family.model(family.with_tokenizer(tmp_path))


def test_auto_classes_know_the_model(family: Family, tiny: Any, tmp_path: Path) -> None:
    folder = family.tiny
    if family is PLUS:  # as it is saved; test_video_salmonn2_plus_loading.py has the original's format
        tiny.save_pretrained(tmp_path)
        family.processor().save_pretrained(folder := tmp_path)
    assert type(AutoConfig.from_pretrained(folder)) is family.config_class
    assert AutoConfig.from_pretrained(folder).scheme == tiny.config.scheme
    assert type(AutoProcessor.from_pretrained(folder)) is family.processor_class
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(folder, dtype=torch.float32)
        assert type(model) is family.model_class
        assert_same_weights(model, tiny)
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert type(base) is family.base_class
    if family is PLUS:
        assert base.state_dict().keys() == tiny.state_dict().keys() - {"lm_head.weight"}
    else:
        assert_same_weights(base, tiny.model)


def test_missing_key_is_an_error_that_names_it(family: Family, tmp_path: Path) -> None:
    for number, key in enumerate(MISSING[family.name]):
        with pytest.raises(CheckpointError, match=rf"lacks 1 key: {key}"):
            family.model(native.variant(family, tmp_path / str(number), without(key)))


def test_parts_of_another_kind_are_an_error(family: Family, tmp_path: Path) -> None:
    for number, (config, message) in enumerate(OTHER_KINDS[family.name]):
        with pytest.raises(UnsupportedModel, match=message):
            family.model(native.variant(family, tmp_path / str(number), **config))


def test_stock_from_pretrained_is_as_strict(family: Family, variant: Callable[..., Path]) -> None:
    folder = variant(without("model.norm."), **AUTO.get(family.name, {}))
    own = "norm.weight" if family is S2 else "model.norm.weight"  # of the model without its head
    for auto, key in ((AutoModelForImageTextToText, "model.norm.weight"), (AutoModel, own)):
        with pytest.raises(CheckpointError, match=f"lacks 1 key: {re.escape(key)} "):
            auto.from_pretrained(folder)


def test_unknown_key_is_an_error_that_names_it(family: Family, variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"has unknown 1 key: model\.extra\.weight"):
        family.model(variant(lambda weights: weights | {"model.extra.weight": torch.zeros(2)}))


def test_key_of_another_shape_is_an_error_that_names_it(family: Family, variant: Callable[..., Path]) -> None:
    key = "ln_speech.weight" if family is S2 else "model.norm.weight"
    with pytest.raises(CheckpointError, match=rf"has other shapes for 1 key: {key}"):
        family.model(variant(lambda weights: weights | {key: torch.zeros(7)}))


def test_truncated_file_is_an_error(family: Family, variant: Callable[..., Path]) -> None:
    folder = variant()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        family.model(folder)


@pytest.mark.parametrize("source", ["no/such-model", "/no/such/folder"])
def test_nothing_there_is_an_error(family: Family, source: str) -> None:
    for read in (family.adapter.load, family.adapter.config):
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            read(source)


def test_another_models_checkpoint_is_an_error(family: Family, variant: Callable[..., Path]) -> None:
    config, message = OTHERS[family.name]
    with pytest.raises(CheckpointError, match=message):
        family.model(variant(**config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(family: Family, tiny: Any, dtype: torch.dtype) -> None:
    half = family.model_class.from_pretrained(family.tiny, dtype=dtype)
    assert half.dtype == dtype
    ours, wanted = logits(family, half).float(), logits(family, tiny)
    assert ours.isfinite().all()
    assert (ours - wanted).abs().mean() <= (0.2 if dtype == torch.bfloat16 else 0.03) * wanted.abs().mean()
