"""Models with random weights, written to disk for vLLM.

Text is bytes, and a token covers 28 x 28 pixels as in the releases. Small models spend most of their time in the
decoder: their encoders are next to nothing. Tokenizers come from `tests/support`, which must be importable.
"""

import json
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
FILE_BYTES = 4_000_000_000  # of a large model's file of weights


def write_omni(folder: Path, decoder: Mapping[str, Any] = DECODER) -> None:
    """Write a Qwen2.5-Omni without a talker.  decoder: its dimensions; a head must be 64 wide."""
    from support.families import qwen2_5_omni

    thinker, width = qwen2_5_omni.thinker(), decoder["hidden_size"]
    thinker["text_config"] |= decoder
    thinker["vision_config"] |= {**VISION, "out_hidden_size": width}
    thinker["audio_config"] |= {"encoder_ffn_dim": 64, "output_dim": width}
    config = _omni_config(thinker)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config)
    _write(folder, config, model, _omni_processor(mels=16), prefix="thinker.")


def write_omni_7b(folder: Path, device: torch.device) -> None:
    """Write a model with the dimensions of Qwen2.5-Omni-7B's thinker, in bfloat16: 18 GB, in files of at most 4 GB.

    The tokenizer has 256 bytes and few marks, so the rest of the vocabulary is never generated: its rows of the last
    matrix are zero. device: where weights are drawn.
    """
    from fastav.models.qwen2_5_omni import Qwen25OmniAdapter
    from support.families import qwen2_5_omni

    tiny, released = qwen2_5_omni.thinker(), Qwen25OmniAdapter().config().to_dict()
    config = _omni_config(released | {name: value for name, value in tiny.items() if not name.endswith("_config")})
    processor = _omni_processor(mels=released["audio_config"]["num_mel_bins"])
    with torch.device("meta"):
        model = Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)
    files, shard, size = dict[str, str](), dict[str, torch.Tensor](), 0
    for name, shape in model.state_dict().items():
        weight = _random(name, shape, generator).to(torch.bfloat16)
        if name == "lm_head.weight":
            weight[len(processor.tokenizer) :] = 0
        if size + weight.nbytes > FILE_BYTES:
            _write_shard(folder, shard, files)
            size = 0
        shard[f"thinker.{name}"] = weight.cpu()
        size += weight.nbytes
    _write_shard(folder, shard, files)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _write_shard(folder: Path, shard: dict[str, torch.Tensor], files: dict[str, str]) -> None:
    """Write weights, forget them, and note their file."""
    file = f"model-{len(set(files.values())) + 1:05}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    files |= dict.fromkeys(shard, file)
    shard.clear()


def _omni_config(thinker: Mapping[str, Any]) -> Any:
    config: Any = Qwen2_5OmniConfig(thinker_config=dict(thinker), enable_audio_output=False)
    config.architectures = ["Qwen2_5OmniModel"]
    return config


def _omni_processor(mels: int) -> Any:
    from support.families import qwen2_5_omni

    tiny: Any = qwen2_5_omni.processor()
    audio = WhisperFeatureExtractor(feature_size=mels, chunk_length=30, return_attention_mask=True)
    return Qwen2_5OmniProcessor(*_pixels(), audio, tiny.tokenizer, chat_template=tiny.chat_template)


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
    """A weight of this shape, on the device of the generator."""
    device = generator.device
    if weight.ndim == 1:
        return torch.full(weight.shape, 1.0 if "norm" in name or "ln_q" in name else 0.0, device=device)
    return torch.randn(weight.shape, generator=generator, device=device) * SPREAD / weight[0].numel() ** 0.5
