"""Tiny checkpoints in the format that `vllm serve` loads, with random weights whose attention is far from uniform.

The families of `tests/support/families` again, as whole models and with heads wide enough for vLLM's CPU attention.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, Qwen2_5OmniConfig, Qwen2_5OmniThinkerForConditionalGeneration

from support.families import qwen2_5_omni, qwen2_5_vl
from support.families._tiny import randomized

HEADS = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
SECTIONS = [4, 6, 6]  # of M-RoPE: half of a head of 32


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


def _written(folder: Path, config: Any, model: PreTrainedModel, processor: Any, prefix: str = "") -> Path:
    config.dtype = torch.float32
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = {prefix + name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sight(folder: Path) -> Path:
    """A Qwen2.5-VL."""
    model, processor = qwen2_5_vl.build()
    config: Any = model.config
    for name, value in HEADS.items():
        setattr(config.text_config, name, value)
    config.text_config.rope_parameters["mrope_section"] = SECTIONS
    config.vision_config.out_hidden_size = HEADS["hidden_size"]
    config.architectures = [type(model).__name__]
    model = randomized(type(model)(config), "sdpa", scale=0.15)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
