"""A tiny Qwen3-Omni thinker, a mixture of experts."""

from typing import Any

from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from support.families._tiny import TEXT, byte_tokenizer, randomized, template

MARKS = {
    "image_token": "<|image_pad|>",
    "audio_token": "<|audio_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
# the official processor scales every frame to at least 128 * 32 * 32 pixels: large patches keep its tokens few
SIZES = {"patch_size": 64, "merge_size": 2, "temporal_patch_size": 2}


def processor() -> ProcessorMixin:
    return Qwen3OmniMoeProcessor(
        Qwen2VLImageProcessorPil(**SIZES),
        Qwen2VLVideoProcessor(**SIZES, cap_pixels_per_frame=True),
        WhisperFeatureExtractor(feature_size=16, chunk_length=5, return_attention_mask=True),
        byte_tokenizer(**MARKS),
        chat_template=template(
            video="<|vision_start|><|video_pad|><|vision_end|>",
            audio="<|audio_start|><|audio_pad|><|audio_end|>",
            image="<|vision_start|><|image_pad|><|vision_end|>",
        ),
    )


def thinker() -> dict[str, Any]:
    """Arguments of the thinker's configuration."""
    tokenizer = byte_tokenizer(**MARKS)
    image, audio, video, start, end, begin, stop = tokenizer.convert_tokens_to_ids(list(MARKS.values()))
    return {
        "text_config": {
            **TEXT,
            "vocab_size": len(tokenizer),
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": TEXT["hidden_size"],
            "patch_size": SIZES["patch_size"],
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        "audio_config": {
            "num_mel_bins": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "d_model": 32,
            "output_dim": TEXT["hidden_size"],
            "downsample_hidden_size": 8,
        },
        "position_id_per_seconds": 13,
        "image_token_id": image,
        "audio_token_id": audio,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "audio_start_token_id": begin,
        "audio_end_token_id": stop,
    }


def build(attention: str = "sdpa") -> tuple[PreTrainedModel, ProcessorMixin]:
    model = Qwen3OmniMoeThinkerForConditionalGeneration(Qwen3OmniMoeThinkerConfig(**thinker()))
    return randomized(model, attention), processor()


def full_model() -> PreTrainedModel:
    """A tiny full model, with a talker."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    talker = {
        **small,
        "head_dim": 16,
        "vocab_size": 16,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
        },
    }
    codes = {"num_quantizers": 2, "codebook_size": 8, "decoder_dim": 32}
    config = Qwen3OmniMoeConfig(
        thinker_config=thinker(),
        talker_config={
            "text_config": talker,
            "code_predictor_config": {**small, "head_dim": 16, "vocab_size": 16, "num_code_groups": 2},
            "thinker_hidden_size": TEXT["hidden_size"],
            "num_code_groups": 2,
            "spatial_merge_size": 2,
        },
        code2wav_config={**small, **codes, "upsample_rates": [2, 2], "upsampling_ratios": [2]},
    )
    return randomized(Qwen3OmniMoeForConditionalGeneration(config), "sdpa")
