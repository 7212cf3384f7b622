"""Checkpoints of video-SALMONN 2+: the original's format and ours, whole or damaged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    Qwen2_5_VLConfig,
)

from fastav.errors import CheckpointError
from fastav.models.video_salmonn2_plus import (
    VideoSalmonn2PlusAdapter,
    VideoSalmonn2PlusConfig,
    VideoSalmonn2PlusProcessor,
)
from support.native import VIDEO_SALMONN2_PLUS as FAMILY
from support.native import assert_same_weights, variant, without

TABLE = "audio.qformer.bert.embeddings.position_ids"  # 0, 1, 2, ...: saved by old versions of BERT, never read


@pytest.fixture(scope="module")
def tiny() -> Any:
    return FAMILY.model()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_auto_classes_take_the_originals_format_with_our_configuration(
    tiny: Any,
) -> None:
    config = VideoSalmonn2PlusConfig.from_pretrained(FAMILY.tiny)
    assert_same_weights(AutoModelForMultimodalLM.from_pretrained(FAMILY.tiny, config=config, dtype=torch.float32), tiny)
    # the original's config.json claims to be stock Qwen2.5-VL, and stays so for others
    assert type(AutoConfig.from_pretrained(FAMILY.tiny)) is Qwen2_5_VLConfig


def test_unused_table_may_be_missing(tmp_path: Path, tiny: Any) -> None:
    assert_same_weights(FAMILY.model(variant(FAMILY, tmp_path, without(TABLE))), tiny)


def test_tied_head_may_be_missing(tmp_path: Path) -> None:
    model = FAMILY.model(variant(FAMILY, tmp_path, without("lm_head."), tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_unknown_position_rule_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="positions must be script or dataset, got 'scirpt'"):
        VideoSalmonn2PlusConfig(positions="scirpt")


def test_position_rule_may_stand_in_the_checkpoint(tmp_path: Path) -> None:
    folder = variant(FAMILY, tmp_path, positions="dataset")
    model, processor = VideoSalmonn2PlusAdapter().load(str(folder), dtype=torch.float32)
    assert model.config.positions == processor.media.positions == "dataset"
    assert VideoSalmonn2PlusProcessor.from_pretrained(FAMILY.tiny, positions="dataset").media.positions == "dataset"
