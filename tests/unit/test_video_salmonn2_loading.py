"""Checkpoints of video-SALMONN 2: the original's format and ours, whole or damaged."""

from pathlib import Path
from typing import Any

import pytest

from fastav.errors import CheckpointError
from fastav.models.video_salmonn2 import (
    VideoSalmonn2Adapter,
    VideoSalmonn2Config,
    VideoSalmonn2ForConditionalGeneration,
)
from fastav.models.video_salmonn2.configuration import gather
from support.native import VIDEO_SALMONN2 as FAMILY
from support.native import assert_same_weights, variant, without

UNUSED = "speech_Qformer.bert.embeddings.position_ids"


@pytest.fixture(scope="module")
def tiny() -> Any:
    return FAMILY.model()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_unused_buffer_may_be_absent(tiny: Any, tmp_path: Path) -> None:
    assert_same_weights(FAMILY.model(variant(FAMILY, tmp_path, without(UNUSED))), tiny)


def test_damaged_dimensions_are_an_error(tmp_path: Path) -> None:
    folder = variant(FAMILY, tmp_path)
    (folder / "aux_config.json").write_text('{"siglip": {')
    with pytest.raises(CheckpointError, match="damaged"):
        VideoSalmonn2Adapter().config(str(folder))


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
    config = VideoSalmonn2Adapter().config(str(FAMILY.tiny))
    assert (config.hidden_size, config.vision_config.image_size, config.speech_config.d_model) == (64, 56, 32)


def test_fresh_newlines_and_queries_are_random(tiny: Any) -> None:
    fresh = VideoSalmonn2ForConditionalGeneration(tiny.config)
    assert fresh.model.image_newline.std() > 0
    assert fresh.speech_query_tokens.std() > 0
