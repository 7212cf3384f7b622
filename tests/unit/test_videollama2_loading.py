"""Checkpoints of VideoLLaMA2: the original's format and ours, whole or damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    SiglipVisionModel,
)

from fastav.errors import CheckpointError, UnsupportedModel
from fastav.models.videollama2 import (
    VideoLlama2Adapter,
    VideoLlama2Config,
    VideoLlama2ForConditionalGeneration,
    VideoLlama2Model,
    VideoLlama2Processor,
    soundtrack_features,
)

TINY = Path(__file__).parents[1] / "reference" / "videollama2"
VISION = "model.vision_tower."
SHARED = ".relative_attention_bias.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tiny() -> VideoLlama2ForConditionalGeneration:
    return load(TINY)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., Path]:
    """Copy the tiny checkpoint with other weights or another configuration."""

    def make(change: Callable[[Weights], Weights] | None = None, tower: bool = True, **config: Any) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.npz", "*.mp4", "*.wav"))
        if change is not None:
            weights = change(load_file(folder / "model.safetensors"))
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        if not tower:
            shutil.rmtree(folder / "siglip-tiny-patch14")
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | config))
        return folder

    return make


def load(folder: Path) -> VideoLlama2ForConditionalGeneration:
    return VideoLlama2Adapter().load(str(folder), dtype=torch.float32)[0]


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if not any(p in name for p in parts)}


def assert_same(ours: torch.nn.Module, other: torch.nn.Module) -> None:
    left, right = ours.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def logits(model: VideoLlama2ForConditionalGeneration) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scheme = model.config.scheme
    run = [scheme.video_token_id] * scheme.video_tokens(4) + [scheme.audio_token_id] * scheme.audio_tokens
    pixels = torch.rand(1, 4, 3, scheme.image_size, scheme.image_size, generator=generator)
    sound, _ = soundtrack_features(torch.rand(50_000, generator=generator).numpy() - 0.5, scheme)
    with torch.no_grad():
        ids = torch.tensor([[1, 2, *run, 3]])
        return model(input_ids=ids, pixel_values_videos=pixels, input_features=sound[None], logits_to_keep=20).logits


def test_saving_and_loading_changes_nothing(tiny: VideoLlama2ForConditionalGeneration, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    again = VideoLlama2ForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(again, tiny)
    assert (logits(again) - logits(tiny)).abs().max() < 1e-4  # weights are equal; kernels round by alignment
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(TINY / "model.safetensors").keys()
    ours, other = again.config.to_dict(), tiny.config.to_dict()
    assert {key for key in ours | other if ours[key] != other[key]} <= {"architectures", "_name_or_path"}


def test_model_made_from_a_configuration_saves_the_originals_names(
    tiny: VideoLlama2ForConditionalGeneration, tmp_path: Path
) -> None:
    fresh = VideoLlama2ForConditionalGeneration(tiny.config)
    fresh.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(TINY / "model.safetensors").keys()
    assert_same(load(with_tokenizer(tmp_path)), fresh)


def with_tokenizer(folder: Path) -> Path:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


def test_fresh_weights_are_finite_and_reproducible(tiny: VideoLlama2ForConditionalGeneration) -> None:
    torch.manual_seed(0)
    fresh = VideoLlama2ForConditionalGeneration(tiny.config).eval()
    assert logits(fresh).isfinite().all()


def test_sharded_checkpoint_loads(tiny: VideoLlama2ForConditionalGeneration, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(load(with_tokenizer(tmp_path)), tiny)


def test_missing_shard_is_an_error(tiny: VideoLlama2ForConditionalGeneration, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="300KB")
    min(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of"):
        load(with_tokenizer(tmp_path))


def test_damaged_index_is_an_error(tiny: VideoLlama2ForConditionalGeneration, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="300KB")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {')
    with pytest.raises(CheckpointError, match="damaged"):
        load(with_tokenizer(tmp_path))


def test_auto_classes_know_the_model(tiny: VideoLlama2ForConditionalGeneration) -> None:
    assert type(AutoConfig.from_pretrained(TINY)) is VideoLlama2Config
    assert AutoConfig.from_pretrained(TINY).scheme == tiny.config.scheme
    assert type(AutoProcessor.from_pretrained(TINY)) is VideoLlama2Processor
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(TINY, dtype=torch.float32)
        assert type(model) is VideoLlama2ForConditionalGeneration
        assert_same(model, tiny)
    base = AutoModel.from_pretrained(TINY, dtype=torch.float32)
    assert type(base) is VideoLlama2Model
    assert_same(base, tiny.model)


def test_siglip_comes_from_its_own_folder_if_the_checkpoint_has_none(
    tiny: VideoLlama2ForConditionalGeneration, variant: Callable[..., Path]
) -> None:
    assert_same(load(variant(without(VISION))), tiny)


def test_siglip_folder_may_be_anywhere(
    tiny: VideoLlama2ForConditionalGeneration, variant: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(TINY / "siglip-tiny-patch14", tmp_path / "elsewhere")
    folder = variant(without(VISION), tower=False, mm_vision_tower=str(tmp_path / "elsewhere"))
    assert_same(load(folder), tiny)


def test_no_siglip_anywhere_is_an_error(
    variant: Callable[..., Path], tiny: VideoLlama2ForConditionalGeneration
) -> None:
    folder = variant(without(VISION), tower=False, vision_config=tiny.config.vision_config.to_dict())
    with pytest.raises(CheckpointError, match="holds no SigLIP weights"):
        load(folder)


def test_siglip_of_unknown_dimensions_is_an_error(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a reachable hub id"):
        load(variant(tower=False))


def test_siglip_of_other_dimensions_is_an_error(
    variant: Callable[..., Path], tiny: VideoLlama2ForConditionalGeneration
) -> None:
    other = tiny.config.vision_config.to_dict() | {"intermediate_size": 32}
    with pytest.raises(CheckpointError, match=r"has other shapes for .*fc1"):
        load(variant(without(VISION), vision_config=other))


def test_damaged_siglip_is_an_error(variant: Callable[..., Path]) -> None:
    folder = variant(without(VISION))
    tower = SiglipVisionModel.from_pretrained(folder / "siglip-tiny-patch14")
    weights = {f"vision_model.{name}": value for name, value in tower.state_dict().items() if "layers.1." not in name}
    save_file(weights, folder / "siglip-tiny-patch14" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 16 keys: encoder\.layers\.1\."):
        load(folder)


@pytest.mark.parametrize("kept", [0, 1])
def test_shared_position_table_may_be_stored_once(
    tiny: VideoLlama2ForConditionalGeneration, variant: Callable[..., Path], kept: int
) -> None:
    assert_same(load(variant(without(f"layers.{1 - kept}.self_attn{SHARED}"))), tiny)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.audio_tower.encoder.pos_conv.0.weight_g",
        "model.audio_tower.predictor.bias",
        "model.mm_projector.s2.b3.se.fc1.weight",
        "model.vision_tower.vision_tower.vision_model.head.probe",
        "lm_head.weight",
        SHARED,
    ],
)
def test_missing_key_is_an_error_that_names_it(variant: Callable[..., Path], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"lacks \d keys?: .*{key}"):
        load(variant(without(key)))


def test_stock_from_pretrained_is_as_strict(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        AutoModelForImageTextToText.from_pretrained(variant(without("model.norm.")))


def test_unknown_key_is_an_error_that_names_it(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"has unknown 1 key: model\.extra\.weight"):
        load(variant(lambda weights: weights | {"model.extra.weight": torch.zeros(2)}))


def test_key_of_another_shape_is_an_error_that_names_it(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"has other shapes for 1 key: model\.norm\.weight"):
        load(variant(lambda weights: weights | {"model.norm.weight": torch.zeros(7)}))


def test_of_many_keys_ten_are_named(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"lacks 48 keys: .* and 38 more") as error:
        load(variant(without("model.layers.")))
    assert error.value.message.count("model.layers.") == 10


def test_truncated_file_is_an_error(variant: Callable[..., Path]) -> None:
    folder = variant()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load(folder)


@pytest.mark.parametrize("source", ["no/such-model", "/no/such/folder"])
def test_nothing_there_is_an_error(source: str) -> None:
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        VideoLlama2Adapter().load(source)
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        VideoLlama2Adapter().config(source)


def test_another_models_checkpoint_is_an_error(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="of a qwen2 model"):
        load(variant(model_type="qwen2"))


@pytest.mark.parametrize("key", ["mm_projector_type", "mm_projector_a_type", "mm_vision_select_feature"])
def test_parts_of_another_kind_are_an_error(variant: Callable[..., Path], key: str) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        load(variant(**{key: "linear"}))


def test_unknown_beats_dimension_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="unknown keys: heads"):
        VideoLlama2Config(beats_config={"heads": 2})


def test_release_configuration_needs_no_download() -> None:
    config = VideoLlama2Adapter().config()
    assert config.architectures == ["Videollama2Qwen2ForCausalLM"]
    assert config.rope_parameters["rope_theta"] == 1_000_000
    original = {"mm_vision_tower": "google/siglip-so400m-patch14-384", "num_frames": None}
    assert VideoLlama2Config.from_dict(original).vision_config.to_dict() == config.vision_config.to_dict()
    assert VideoLlama2Config.from_dict(original).num_frames == 8


def test_configuration_of_a_checkpoint_needs_no_weights() -> None:
    config = VideoLlama2Adapter().config(str(TINY))
    assert (config.hidden_size, config.vision_config.image_size, config.beats.encoder_layers) == (48, 75, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(tiny: VideoLlama2ForConditionalGeneration, dtype: torch.dtype) -> None:
    half = VideoLlama2ForConditionalGeneration.from_pretrained(TINY, dtype=dtype)
    assert half.dtype == dtype
    ours, wanted = logits(half).float(), logits(tiny)
    assert ours.isfinite().all()
    assert (ours - wanted).abs().mean() <= (0.2 if dtype == torch.bfloat16 else 0.03) * wanted.abs().mean()
