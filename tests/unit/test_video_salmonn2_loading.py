"""Checkpoints of video-SALMONN 2: the original's format and ours, whole or damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from fastav.errors import CheckpointError, UnsupportedModel
from fastav.models.video_salmonn2 import (
    VideoSalmonn2Adapter,
    VideoSalmonn2Config,
    VideoSalmonn2ForConditionalGeneration,
    VideoSalmonn2Model,
    VideoSalmonn2Processor,
)
from fastav.models.video_salmonn2.configuration import gather

TINY = Path(__file__).parents[1] / "reference" / "video_salmonn2"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
UNUSED = "speech_Qformer.bert.embeddings.position_ids"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tiny() -> VideoSalmonn2ForConditionalGeneration:
    return load(TINY)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., Path]:
    """Copy the tiny checkpoint with other weights or another configuration."""

    def make(change: Callable[[Weights], Weights] | None = None, **config: Any) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.npz", "*.mp4"))
        if change is not None:
            weights = change(load_file(folder / "model.safetensors"))
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | config))
        return folder

    return make


def load(folder: Path) -> VideoSalmonn2ForConditionalGeneration:
    return VideoSalmonn2Adapter().load(str(folder), dtype=torch.float32)[0]


def with_tokenizer(folder: Path) -> Path:
    for name in TOKENIZER:
        shutil.copy(TINY / name, folder)
    return folder


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if not any(p in name for p in parts)}


def assert_same(ours: torch.nn.Module, other: torch.nn.Module) -> None:
    left, right = ours.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def logits(model: VideoSalmonn2ForConditionalGeneration) -> torch.Tensor:
    generator, scheme = torch.Generator().manual_seed(0), model.config.scheme
    run = [scheme.video_token_id] * scheme.frame_tokens * 2 + [scheme.audio_token_id] * scheme.piece_tokens
    pixels = torch.rand(2, 3, scheme.image_size, scheme.image_size, generator=generator) * 2 - 1
    mel = torch.rand(1, scheme.mel_bins, 3000, generator=generator)
    with torch.no_grad():
        ids = torch.tensor([[1, 2, *run, 3]])
        return model(input_ids=ids, pixel_values_videos=pixels, input_features=mel, logits_to_keep=20).logits


def test_saving_and_loading_changes_nothing(tiny: VideoSalmonn2ForConditionalGeneration, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    again = VideoSalmonn2ForConditionalGeneration.from_pretrained(tmp_path)  # no aux_config.json there
    assert_same(again, tiny)
    assert torch.equal(logits(again), logits(tiny))
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(TINY / "model.safetensors").keys()
    ours, other = again.config.to_dict(), tiny.config.to_dict()
    assert {key for key in ours | other if ours[key] != other[key]} <= {"architectures", "_name_or_path"}


def test_model_made_from_a_configuration_saves_the_originals_names(
    tiny: VideoSalmonn2ForConditionalGeneration, tmp_path: Path
) -> None:
    fresh = VideoSalmonn2ForConditionalGeneration(tiny.config)
    fresh.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(TINY / "model.safetensors").keys()
    assert_same(load(with_tokenizer(tmp_path)), fresh)


def test_fresh_weights_are_finite_and_reproducible(tiny: VideoSalmonn2ForConditionalGeneration) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(VideoSalmonn2ForConditionalGeneration(tiny.config).eval())
    assert_same(*models)
    assert logits(models[0]).isfinite().all()
    assert models[0].model.image_newline.std() > 0
    assert models[0].speech_query_tokens.std() > 0


def test_sharded_checkpoint_loads(tiny: VideoSalmonn2ForConditionalGeneration, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(load(with_tokenizer(tmp_path)), tiny)
    min(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of"):
        load(tmp_path)


def test_damaged_index_is_an_error(tiny: VideoSalmonn2ForConditionalGeneration, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="300KB")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {')
    with pytest.raises(CheckpointError, match="damaged"):
        load(with_tokenizer(tmp_path))


def test_auto_classes_know_the_model(tiny: VideoSalmonn2ForConditionalGeneration) -> None:
    assert type(AutoConfig.from_pretrained(TINY)) is VideoSalmonn2Config
    assert AutoConfig.from_pretrained(TINY).scheme == tiny.config.scheme
    assert type(AutoProcessor.from_pretrained(TINY)) is VideoSalmonn2Processor
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(TINY, dtype=torch.float32)
        assert type(model) is VideoSalmonn2ForConditionalGeneration
        assert_same(model, tiny)
    base = AutoModel.from_pretrained(TINY, dtype=torch.float32)
    assert type(base) is VideoSalmonn2Model
    assert_same(base, tiny.model)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.image_newline",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
        "speech_query_tokens",
        "speech_encoder.embed_positions.weight",
        "speech_Qformer.bert.encoder.layer.1.crossattention.self.key.weight",
        "final_linear.2.bias",
        "lm_head.weight",
    ],
)
def test_missing_key_is_an_error_that_names_it(variant: Callable[..., Path], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"lacks 1 key: {key}"):
        load(variant(without(key)))


def test_unused_buffer_may_be_absent(tiny: VideoSalmonn2ForConditionalGeneration, variant: Callable[..., Path]) -> None:
    assert_same(load(variant(without(UNUSED))), tiny)


def test_stock_from_pretrained_is_as_strict(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        AutoModelForImageTextToText.from_pretrained(variant(without("model.norm.")))


def test_unknown_key_is_an_error_that_names_it(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"has unknown 1 key: model\.extra\.weight"):
        load(variant(lambda weights: weights | {"model.extra.weight": torch.zeros(2)}))


def test_key_of_another_shape_is_an_error_that_names_it(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"has other shapes for 1 key: ln_speech\.weight"):
        load(variant(lambda weights: weights | {"ln_speech.weight": torch.zeros(7)}))


def test_truncated_file_is_an_error(variant: Callable[..., Path]) -> None:
    folder = variant()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load(folder)


def test_damaged_dimensions_are_an_error(variant: Callable[..., Path]) -> None:
    folder = variant()
    (folder / "aux_config.json").write_text('{"siglip": {')
    with pytest.raises(CheckpointError, match="damaged"):
        VideoSalmonn2Adapter().config(str(folder))


@pytest.mark.parametrize("source", ["no/such-model", "/no/such/folder"])
def test_nothing_there_is_an_error(source: str) -> None:
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        VideoSalmonn2Adapter().load(source)
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        VideoSalmonn2Adapter().config(source)


def test_another_models_checkpoint_is_an_error(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="of a qwen2 model"):
        load(variant(model_type="qwen2"))


@pytest.mark.parametrize("key", ["mm_spatial_pool_mode", "mm_pooling_position", "mm_newline_position"])
def test_parts_of_another_kind_are_an_error(variant: Callable[..., Path], key: str) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        load(variant(model_args={key: "other"}))


def test_projector_of_another_kind_is_an_error() -> None:
    with pytest.raises(UnsupportedModel, match="mm_projector_type"):
        VideoSalmonn2Config(mm_projector_type="linear")


def test_unknown_qformer_dimension_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="unknown keys: heads"):
        VideoSalmonn2Config(qformer_config={"heads": 2})


def test_what_the_scripts_overwrite_is_not_read_from_the_checkpoint() -> None:
    config = VideoSalmonn2Config.from_dict({"mm_spatial_pool_mode": "bilinear", "rope_scaling": {"type": "linear"}})
    assert config.mm_spatial_pool_mode == "max"
    assert config.rope_parameters["rope_type"] == "default"


def test_arguments_come_from_the_file_then_beside_it_then_the_scripts() -> None:
    arguments = {"second_per_window": 1.0, "second_stride": 1.0, "fps": 4, "mm_spatial_pool_stride": 3}
    found = gather({"second_per_window": 3.0, "model_args": arguments}, {"second_stride": 2.0})
    names = ("second_per_window", "second_stride", "video_fps", "mm_spatial_pool_stride")
    assert [found[name] for name in names] == [3.0, 2.0, 4, 3]


def test_release_configuration_needs_no_download() -> None:
    config = VideoSalmonn2Adapter().config()
    assert config.architectures == ["VideoSALMONN2ForCausalLM"]
    assert config.rope_parameters["rope_theta"] == 1_000_000
    assert VideoSalmonn2Config.from_dict({}).scheme == config.scheme
    placeholders = (config.video_token_id, config.audio_token_id, config.blank_token_id)
    assert placeholders == (152_062, 152_063, 152_061)


def test_configuration_of_a_checkpoint_needs_no_weights() -> None:
    config = VideoSalmonn2Adapter().config(str(TINY))
    assert (config.hidden_size, config.vision_config.image_size, config.speech_config.d_model) == (64, 56, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(tiny: VideoSalmonn2ForConditionalGeneration, dtype: torch.dtype) -> None:
    half = VideoSalmonn2ForConditionalGeneration.from_pretrained(TINY, dtype=dtype)
    assert half.dtype == dtype
    ours, wanted = logits(half).float(), logits(tiny)
    assert ours.isfinite().all()
    assert (ours - wanted).abs().mean() <= (0.2 if dtype == torch.bfloat16 else 0.03) * wanted.abs().mean()
