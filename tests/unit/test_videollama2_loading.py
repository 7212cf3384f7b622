"""Checkpoints of VideoLLaMA2: the original's format and ours, whole or damaged."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from transformers import (
    SiglipVisionModel,
)

from fastav.errors import CheckpointError
from fastav.models.videollama2 import (
    VideoLlama2Adapter,
    VideoLlama2Config,
)
from support.native import VIDEOLLAMA2 as FAMILY
from support.native import assert_same_weights, variant, without

VISION = "model.vision_tower."
SHARED = ".relative_attention_bias.weight"


@pytest.fixture(scope="module")
def tiny() -> Any:
    return FAMILY.model()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def without_tower(folder: Path) -> Path:
    shutil.rmtree(folder / "siglip-tiny-patch14")
    return folder


def test_siglip_comes_from_its_own_folder_if_the_checkpoint_has_none(tiny: Any, tmp_path: Path) -> None:
    assert_same_weights(FAMILY.model(variant(FAMILY, tmp_path, without(VISION))), tiny)


def test_siglip_folder_may_be_anywhere(tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(FAMILY.tiny / "siglip-tiny-patch14", tmp_path / "elsewhere")
    folder = without_tower(variant(FAMILY, tmp_path, without(VISION), mm_vision_tower=str(tmp_path / "elsewhere")))
    assert_same_weights(FAMILY.model(folder), tiny)


def test_no_siglip_anywhere_is_an_error(tmp_path: Path, tiny: Any) -> None:
    folder = without_tower(
        variant(FAMILY, tmp_path, without(VISION), vision_config=tiny.config.vision_config.to_dict())
    )
    with pytest.raises(CheckpointError, match="holds no SigLIP weights"):
        FAMILY.model(folder)


def test_siglip_of_unknown_dimensions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a reachable hub id"):
        FAMILY.model(without_tower(variant(FAMILY, tmp_path)))


def test_siglip_of_other_dimensions_is_an_error(tmp_path: Path, tiny: Any) -> None:
    other = tiny.config.vision_config.to_dict() | {"intermediate_size": 32}
    with pytest.raises(CheckpointError, match=r"has other shapes for .*fc1"):
        FAMILY.model(variant(FAMILY, tmp_path, without(VISION), vision_config=other))


def test_damaged_siglip_is_an_error(tmp_path: Path) -> None:
    folder = variant(FAMILY, tmp_path, without(VISION))
    tower = SiglipVisionModel.from_pretrained(folder / "siglip-tiny-patch14")
    weights = {f"vision_model.{name}": value for name, value in tower.state_dict().items() if "layers.1." not in name}
    save_file(weights, folder / "siglip-tiny-patch14" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 16 keys: encoder\.layers\.1\."):
        FAMILY.model(folder)


@pytest.mark.parametrize("kept", [0, 1])
def test_shared_position_table_may_be_stored_once(tiny: Any, tmp_path: Path, kept: int) -> None:
    assert_same_weights(FAMILY.model(variant(FAMILY, tmp_path, without(f"layers.{1 - kept}.self_attn{SHARED}"))), tiny)


def test_of_many_keys_ten_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks 48 keys: .* and 38 more") as error:
        FAMILY.model(variant(FAMILY, tmp_path, without("model.layers.")))
    assert error.value.message.count("model.layers.") == 10


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
    config = VideoLlama2Adapter().config(str(FAMILY.tiny))
    assert (config.hidden_size, config.vision_config.image_size, config.beats.encoder_layers) == (48, 75, 2)


def test_a_table_of_positions_that_is_stored_nowhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"lacks 2 keys: .*{SHARED}"):
        FAMILY.model(variant(FAMILY, tmp_path, without(SHARED)))
