"""Models of middling size and random weights, on disk as vLLM loads them: most of their time goes into the decoder.

Text is bytes, frames are 28 x 28 pixels a token as in the releases, and encoders are next to nothing.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AddedToken,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniConfig,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
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
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
EYE: Mapping[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": WIDTH,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [0],
}
PIXELS: Mapping[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
}
MEL_BINS = 16
# of random weights, by the root of their fan-in: attention is far from uniform, and activations stay small
SPREAD = 1.5
TEMPLATE = (
    "{%% for message in messages %%}<|im_start|>{{ message['role'] }}\n"
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}"
    "{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'text' %%}{{ part['text'] }}%s{%% endif %%}"
    "{%% endfor %%}{%% endif %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)


def omni(folder: Path) -> None:
    """Write a Qwen2.5-Omni that does not speak."""
    marks = {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    tokenizer = _bytes(**marks)
    number: Any = tokenizer.convert_tokens_to_ids
    image, audio, video, start, end, begin, stop = (number(word) for word in marks.values())
    thinker = {
        "text_config": {**DECODER, "vocab_size": len(tokenizer)},
        "vision_config": dict(EYE),
        "audio_config": {
            "num_mel_bins": MEL_BINS,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "output_dim": WIDTH,
        },
        "image_token_index": image,
        "audio_token_index": audio,
        "video_token_index": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "audio_start_token_id": begin,
        "audio_end_token_id": stop,
    }
    config: Any = Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    config.architectures = ["Qwen2_5OmniModel"]
    processor = Qwen2_5OmniProcessor(
        Qwen2VLImageProcessorPil(**PIXELS),
        Qwen2VLVideoProcessor(**PIXELS, cap_pixels_per_frame=True),
        WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=30, return_attention_mask=True),
        tokenizer,
        chat_template=_template(
            video="<|vision_bos|><|VIDEO|><|vision_eos|>", audio="<|audio_bos|><|AUDIO|><|audio_eos|>"
        ),
    )
    model = Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config)
    _write(folder, config, model, processor, prefix="thinker.")


def sight(folder: Path) -> None:
    """Write a Qwen2.5-VL."""
    words = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _bytes(*words)
    number: Any = tokenizer.convert_tokens_to_ids
    start, end, image, video = (number(word) for word in words)
    config = Qwen2_5_VLConfig(
        text_config={**DECODER, "vocab_size": len(tokenizer)},
        vision_config={**EYE, "tokens_per_second": 2},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(**PIXELS),
        tokenizer,
        Qwen2VLVideoProcessor(**PIXELS, cap_pixels_per_frame=True),
        chat_template=_template(video="<|vision_start|><|video_pad|><|vision_end|>"),
    )
    _write(folder, config, Qwen2_5_VLForConditionalGeneration(config), processor)


MADE: Mapping[str, Callable[[Path], None]] = {"small-omni": omni, "small-vl": sight}  # what models are called


def _bytes(*words: str, **named: str) -> Qwen2Tokenizer:
    """A tokenizer of bytes and of whole words.  named: words that the tokenizer knows by an attribute."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *words, *named.values()]
    vocab = {word: number for number, word in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=named)
    tokenizer.add_tokens([AddedToken(word, special=True) for word in special], special_tokens=True)
    return tokenizer


def _template(**media: str) -> str:
    """A chat template in which these words stand for parts of these types."""
    return TEMPLATE % "".join(f"{{% elif part['type'] == '{kind}' %}}{word}" for kind, word in media.items())


def _write(
    folder: Path, config: PreTrainedConfig, model: PreTrainedModel, processor: ProcessorMixin, prefix: str = ""
) -> None:
    """Configuration, processor, and random weights whose names begin with a prefix."""
    draw = torch.Generator().manual_seed(0)
    weights = {name: _random(name, weight, draw) for name, weight in model.state_dict().items()}
    config.dtype = torch.float32
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_file(
        {prefix + name: weight for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _random(name: str, weight: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    if weight.ndim == 1:
        return torch.ones_like(weight) if "norm" in name or "ln_q" in name else torch.zeros_like(weight)
    return torch.randn(weight.shape, generator=draw) * SPREAD / weight[0].numel() ** 0.5
