"""Tiny checkpoints in the format that `vllm serve` loads, with random weights whose attention is far from uniform.

The families of `tests/support/families` again, as whole models and with heads wide enough for vLLM's CPU attention.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
    Qwen2_5OmniConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from support.families import qwen2_5_omni, qwen2_5_vl, qwen3_omni, qwen3_vl, qwen3_vl_moe
from support.families._tiny import randomized

HEADS = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDTH = 32  # of a head
SECTIONS = [4, 6, 6]  # of M-RoPE: half of a head
INTERLEAVED = [6, 5, 5]


def omni(folder: Path) -> Path:
    """A whole Qwen2.5-Omni that does not speak."""
    thinker = qwen2_5_omni.thinker()
    thinker["text_config"] |= HEADS
    thinker["text_config"]["rope_parameters"] |= {"mrope_section": SECTIONS}
    thinker["vision_config"]["out_hidden_size"] = thinker["audio_config"]["output_dim"] = HEADS["hidden_size"]
    config = Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    config.architectures = ["Qwen2_5OmniModel"]
    model = randomized(Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config), "sdpa", scale=0.15)
    return _written(folder, config, model, qwen2_5_omni.processor(), prefix="thinker.")


def omni3(folder: Path) -> Path:
    """A whole Qwen3-Omni that does not speak: a mixture of experts, with deepstack in its first three layers."""
    thinker = qwen3_omni.thinker()
    thinker["text_config"] |= HEADS | {"head_dim": WIDTH, "num_key_value_heads": 1}  # which two ranks both have
    thinker["text_config"]["rope_parameters"] |= {"mrope_section": INTERLEAVED}
    thinker["vision_config"]["out_hidden_size"] = thinker["audio_config"]["output_dim"] = HEADS["hidden_size"]
    vision = thinker["vision_config"]
    side = vision["patch_size"] * int(vision["num_position_embeddings"] ** 0.5)
    vision |= {"image_size": side, "apply_vit_abs_pos_embed": True}  # stand in released files, and vLLM reads them
    config = Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    config.architectures = ["Qwen3OmniMoeForConditionalGeneration"]
    model = randomized(Qwen3OmniMoeThinkerForConditionalGeneration(config.thinker_config), "sdpa", scale=0.15)
    return _written(folder, config, model, qwen3_omni.processor(), prefix="thinker.")


def _written(folder: Path, config: Any, model: PreTrainedModel, processor: Any, prefix: str) -> Path:
    """A part of a model as the whole: its weights by the names that they have in released files."""
    model.save_pretrained(folder)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = {prefix + name: weight for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sight(folder: Path) -> Path:
    """A Qwen2.5-VL."""
    return _sees(folder, *qwen2_5_vl.build(), SECTIONS)


def sight3(folder: Path) -> Path:
    """A Qwen3-VL, dense, with deepstack in its first two layers."""
    return _sees(folder, *qwen3_vl.build(), INTERLEAVED, head_dim=WIDTH)


def sight3_moe(folder: Path) -> Path:
    """A Qwen3-VL, a mixture of experts."""
    # stands in released files, and vLLM reads it; transformers always does so
    _sees(folder, *qwen3_vl_moe.build(), INTERLEAVED, head_dim=WIDTH, norm_topk_prob=True)
    weights = load_file(folder / "model.safetensors")
    # in released files, and for vLLM, experts stand the other way round; transformers reads both
    turned = {name: w.transpose(1, 2).contiguous() if ".experts." in name else w for name, w in weights.items()}
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _sees(folder: Path, model: PreTrainedModel, processor: Any, sections: list[int], **more: int) -> Path:
    config: Any = model.config
    for name, value in (HEADS | more).items():
        setattr(config.text_config, name, value)
    config.text_config.rope_parameters["mrope_section"] = sections
    config.vision_config.out_hidden_size = HEADS["hidden_size"]
    config.architectures = [type(model).__name__]
    model = randomized(type(model)(config), "sdpa", scale=0.15)
    # vLLM scales the pixels of videos as those of pictures are, and in released files the two are alike
    pictures, videos = processor.image_processor, processor.video_processor
    pictures.image_mean, pictures.image_std = videos.image_mean, videos.image_std
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
