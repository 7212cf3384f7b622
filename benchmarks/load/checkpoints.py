"""Small models with random weights, written to disk for vLLM: most of their time goes into the decoder.

Text is bytes, a token covers 28 x 28 pixels as in the releases, and encoders are next to nothing. Tokenizers come from
`tests/support`, which must be importable.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniConfig,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

WIDTH = 512
DECODER: Mapping[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
VISION: Mapping[str, Any] = {"out_hidden_size": WIDTH, "patch_size": 14, "window_size": 112}
PIXELS: Mapping[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
}
# of random weights, times the root of their fan-in: attention is far from uniform, and activations stay small
SPREAD = 1.5


def write_omni(folder: Path) -> None:
    """Write a Qwen2.5-Omni without a talker."""
    from support.families import qwen2_5_omni

    thinker, tiny = qwen2_5_omni.thinker(), qwen2_5_omni.processor()
    thinker["text_config"] |= DECODER
    thinker["vision_config"] |= VISION
    thinker["audio_config"] |= {"encoder_ffn_dim": 64, "output_dim": WIDTH}
    config: Any = Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    config.architectures = ["Qwen2_5OmniModel"]
    audio = WhisperFeatureExtractor(feature_size=16, chunk_length=30, return_attention_mask=True)
    processor = Qwen2_5OmniProcessor(*_pixels(), audio, tiny.tokenizer, chat_template=tiny.chat_template)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config)
    _write(folder, config, model, processor, prefix="thinker.")


def write_vl(folder: Path) -> None:
    """Write a Qwen2.5-VL."""
    from support.families import qwen2_5_vl

    model, tiny = qwen2_5_vl.build()
    settings = model.config.to_dict()
    settings["text_config"] |= {**DECODER, "layer_types": None}  # which lists every layer
    settings["vision_config"] |= VISION
    config = Qwen2_5_VLConfig(**settings)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    images, videos = _pixels()
    processor = Qwen2_5_VLProcessor(images, tiny.tokenizer, videos, chat_template=tiny.chat_template)
    _write(folder, config, Qwen2_5_VLForConditionalGeneration(config), processor)


SMALL: Mapping[str, Callable[[Path], None]] = {"small-omni": write_omni, "small-vl": write_vl}


def _pixels() -> tuple[Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor]:
    return Qwen2VLImageProcessorPil(**PIXELS), Qwen2VLVideoProcessor(**PIXELS, cap_pixels_per_frame=True)


def _write(
    folder: Path, config: PreTrainedConfig, model: PreTrainedModel, processor: ProcessorMixin, prefix: str = ""
) -> None:
    """Write configuration, processor and random weights.  prefix: of the weights' names."""
    generator = torch.Generator().manual_seed(0)
    weights = {prefix + name: _random(name, weight, generator) for name, weight in model.state_dict().items()}
    config.dtype = torch.float32
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _random(name: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if weight.ndim == 1:
        return torch.ones_like(weight) if "norm" in name or "ln_q" in name else torch.zeros_like(weight)
    return torch.randn(weight.shape, generator=generator) * SPREAD / weight[0].numel() ** 0.5
