"""Checkpoints of video-SALMONN 2+: the original's format and ours, whole or damaged."""

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
    Qwen2_5_VLConfig,
)

from fastav.errors import CheckpointError, UnsupportedModel
from fastav.models.video_salmonn2_plus import (
    VideoSalmonn2PlusAdapter,
    VideoSalmonn2PlusConfig,
    VideoSalmonn2PlusForConditionalGeneration,
    VideoSalmonn2PlusModel,
    VideoSalmonn2PlusProcessor,
)

TINY = Path(__file__).parents[1] / "reference" / "video_salmonn2_plus"
TABLE = "audio.qformer.bert.embeddings.position_ids"  # 0, 1, 2, ...: saved by old versions of BERT, never read
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tiny() -> VideoSalmonn2PlusForConditionalGeneration:
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
        written = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps({k: v for k, v in written.items() if v is not None}))
        return folder

    return make


def load(folder: Path) -> VideoSalmonn2PlusForConditionalGeneration:
    return VideoSalmonn2PlusAdapter().load(str(folder), dtype=torch.float32)[0]


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if not any(p in name for p in parts)}


def assert_same(ours: torch.nn.Module, other: torch.nn.Module) -> None:
    left, right = ours.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def stored() -> set[str]:
    return load_file(TINY / "model.safetensors").keys() - {TABLE}


def logits(model: VideoSalmonn2PlusForConditionalGeneration) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 259, *[262] * 6, *[263] * 60, 260, 2]])
    pixels = torch.randn(24, 1176, generator=generator)
    sound = torch.randn(1, 128, 3000, generator=generator)
    with torch.no_grad():
        return model(
            input_ids=ids,
            pixel_values_videos=pixels,
            video_grid_thw=torch.tensor([[1, 4, 6]]),
            input_features=sound,
        ).logits


def test_saving_and_loading_changes_nothing(tiny: VideoSalmonn2PlusForConditionalGeneration, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    again = VideoSalmonn2PlusForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(again, tiny)
    assert torch.equal(logits(again), logits(tiny))
    assert load_file(tmp_path / "model.safetensors").keys() == stored()
    ours, other = again.config.to_dict(), tiny.config.to_dict()
    assert {key for key in ours | other if ours[key] != other[key]} <= {"architectures", "_name_or_path"}


def test_model_made_from_a_configuration_saves_the_originals_names(
    tiny: VideoSalmonn2PlusForConditionalGeneration, tmp_path: Path
) -> None:
    fresh = VideoSalmonn2PlusForConditionalGeneration(tiny.config)
    assert logits(fresh.eval()).isfinite().all()
    fresh.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == stored()
    assert_same(load(with_tokenizer(tmp_path)), fresh)


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


def test_sharded_checkpoint_loads_and_a_missing_shard_is_an_error(
    tiny: VideoSalmonn2PlusForConditionalGeneration, tmp_path: Path
) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(load(with_tokenizer(tmp_path)), tiny)
    min(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of"):
        load(tmp_path)


def test_auto_classes_know_a_saved_model(tiny: VideoSalmonn2PlusForConditionalGeneration, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    VideoSalmonn2PlusProcessor.from_pretrained(TINY).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is VideoSalmonn2PlusConfig
    assert type(AutoProcessor.from_pretrained(tmp_path)) is VideoSalmonn2PlusProcessor
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(tmp_path, dtype=torch.float32)
        assert type(model) is VideoSalmonn2PlusForConditionalGeneration
        assert_same(model, tiny)
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(base) is VideoSalmonn2PlusModel
    assert base.state_dict().keys() == tiny.state_dict().keys() - {"lm_head.weight"}


def test_auto_classes_take_the_originals_format_with_our_configuration(
    tiny: VideoSalmonn2PlusForConditionalGeneration,
) -> None:
    config = VideoSalmonn2PlusConfig.from_pretrained(TINY)
    assert_same(AutoModelForMultimodalLM.from_pretrained(TINY, config=config, dtype=torch.float32), tiny)
    # the original's config.json claims to be stock Qwen2.5-VL, and stays so for others
    assert type(AutoConfig.from_pretrained(TINY)) is Qwen2_5_VLConfig


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.2.mlp.up_proj.weight",
        "visual.merger.ln_q.weight",
        "audio.conv1.bias",
        "audio.q_tokens",
        "audio.qformer.bert.encoder.layer.1.crossattention.self.key.weight",
        "lm_head.weight",
    ],
)
def test_missing_key_is_an_error_that_names_it(variant: Callable[..., Path], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"lacks 1 key: {key}"):
        load(variant(without(key)))


def test_unused_table_may_be_missing(
    variant: Callable[..., Path], tiny: VideoSalmonn2PlusForConditionalGeneration
) -> None:
    assert_same(load(variant(without(TABLE))), tiny)


def test_stock_from_pretrained_is_as_strict(variant: Callable[..., Path]) -> None:
    folder = variant(without("model.norm."), model_type="video_salmonn2_plus")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        AutoModelForImageTextToText.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        AutoModel.from_pretrained(folder)


def test_unknown_key_is_an_error_that_names_it(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"has unknown 1 key: model\.extra\.weight"):
        load(variant(lambda weights: weights | {"model.extra.weight": torch.zeros(2)}))


def test_key_of_another_shape_is_an_error_that_names_it(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"has other shapes for 1 key: model\.norm\.weight"):
        load(variant(lambda weights: weights | {"model.norm.weight": torch.zeros(7)}))


def test_tied_head_may_be_missing(variant: Callable[..., Path]) -> None:
    model = load(variant(without("lm_head."), tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_truncated_file_is_an_error(variant: Callable[..., Path]) -> None:
    folder = variant()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load(folder)


@pytest.mark.parametrize("source", ["no/such-model", "/no/such/folder"])
def test_nothing_there_is_an_error(source: str) -> None:
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        VideoSalmonn2PlusAdapter().load(source)
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        VideoSalmonn2PlusAdapter().config(source)


def test_another_models_checkpoint_is_an_error(variant: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="of a qwen2_5_vl model"):
        load(variant(audio_config=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"second_stride": 0.25}, "second_stride"), ({"qformer_config": {"query_length": 2}}, "query_length")],
)
def test_ears_of_another_kind_are_an_error(variant: Callable[..., Path], change: dict[str, Any], message: str) -> None:
    audio = json.loads((TINY / "config.json").read_text())["audio_config"]
    with pytest.raises(UnsupportedModel, match=message):
        load(variant(audio_config=audio | change))


def test_unknown_position_rule_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="positions must be script or dataset, got 'scirpt'"):
        VideoSalmonn2PlusConfig(positions="scirpt")


def test_position_rule_may_stand_in_the_checkpoint(variant: Callable[..., Path]) -> None:
    folder = variant(positions="dataset")
    model, processor = VideoSalmonn2PlusAdapter().load(str(folder), dtype=torch.float32)
    assert model.config.positions == processor.media.positions == "dataset"
    assert VideoSalmonn2PlusProcessor.from_pretrained(TINY, positions="dataset").media.positions == "dataset"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(tiny: VideoSalmonn2PlusForConditionalGeneration, dtype: torch.dtype) -> None:
    half = VideoSalmonn2PlusForConditionalGeneration.from_pretrained(TINY, dtype=dtype)
    assert half.dtype == dtype
    ours, wanted = logits(half).float(), logits(tiny)
    assert ours.isfinite().all()
    assert (ours - wanted).abs().mean() <= (0.2 if dtype == torch.bfloat16 else 0.03) * wanted.abs().mean()
