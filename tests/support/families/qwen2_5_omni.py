"""A tiny Qwen2.5-Omni thinker."""

from typing import Any

from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from support.families._tiny import TEXT, byte_tokenizer, randomized, template

MARKS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
# the official processor scales every frame to at least 128 * 28 * 28 pixels: large patches keep its tokens few
SIZES = {"patch_size": 56, "merge_size": 2, "temporal_patch_size": 2}


def processor() -> ProcessorMixin:
    return Qwen2_5OmniProcessor(
        Qwen2VLImageProcessorPil(**SIZES),
        Qwen2VLVideoProcessor(**SIZES, cap_pixels_per_frame=True),
        WhisperFeatureExtractor(feature_size=16, chunk_length=5, return_attention_mask=True),
        byte_tokenizer(**MARKS),
        chat_template=template(
            video="<|vision_bos|><|VIDEO|><|vision_eos|>",
            audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
            image="<|vision_bos|><|IMAGE|><|vision_eos|>",
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
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": TEXT["hidden_size"],
            "patch_size": SIZES["patch_size"],
            "window_size": 224,
            "fullatt_block_indexes": [0],
        },
        "audio_config": {
            "num_mel_bins": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "d_model": 32,
            "output_dim": TEXT["hidden_size"],
        },
        "image_token_index": image,
        "audio_token_index": audio,
        "video_token_index": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "audio_start_token_id": begin,
        "audio_end_token_id": stop,
    }


def build(attention: str = "sdpa") -> tuple[PreTrainedModel, ProcessorMixin]:
    model = Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5OmniThinkerConfig(**thinker()))
    return randomized(model, attention), processor()


def full_model() -> PreTrainedModel:
    """A tiny full model, with a talker."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    talker = {
        **small,
        "intermediate_size": 32,
        "num_key_value_heads": 1,
        "embedding_size": TEXT["hidden_size"],
        "vocab_size": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    sound = {
        **small,
        "emb_dim": 16,
        "num_embeds": 17,
        "mel_dim": 8,
        "enc_dim": 8,
        "enc_emb_dim": 8,
        "enc_channels": [8, 8, 8, 8, 24],
        "enc_attention_channels": 8,
        "enc_se_channels": 8,
        "enc_res2net_scale": 2,
    }
    config = Qwen2_5OmniConfig(
        thinker_config=thinker(),
        talker_config=talker,
        token2wav_config={"dit_config": sound, "bigvgan_config": {"mel_dim": 8, "upsample_initial_channel": 64}},
    )
    return randomized(Qwen2_5OmniForConditionalGeneration(config), "sdpa")
