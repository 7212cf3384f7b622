"""A tiny Gemma 4: layers of both kinds, a window shorter than a prompt, and layers that share keys and values."""

from functools import wraps
from typing import Any

import torch
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from fastav.budgets import Share
from fastav.models.gemma4.adapter import attention_by_tower
from fastav.plan import Keep, Plan, Step
from support.families._tiny import TEXT, byte_tokenizer, randomized, template

DEPTH, SHARED, WINDOW = 24, 4, 24


def plan(first: float, later: float) -> Plan:
    """One cut by position, and fine cuts after layers of full attention."""
    cut = Step(layers="10", method="position", keep=Keep(media=Share(first)))
    return Plan(
        (cut, *(Step(layers=n, method="last-query", keep=Keep(media=Share(later))) for n in ("12", "18"))), "tiny"
    )


PLAN, EVERYTHING = plan(0.6, 0.7), plan(1.0, 1.0)


def build(attention: str = "sdpa", **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = byte_tokenizer(
        "<|video|>",
        image_token="<|image|>",
        boi_token="<|image>",
        eoi_token="<image|>",
        audio_token="<|audio|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
    )
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(feature_size=16),
        Gemma4ImageProcessor(patch_size=4),
        tokenizer,
        Gemma4VideoProcessor(patch_size=4, num_frames=4),
        chat_template=template(video="<|video|>", audio="<|audio|>", image="<|image|>"),
    )
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": DEPTH,
        "head_dim": 16,
        "global_head_dim": 32,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"] * (DEPTH // 6),
        "sliding_window": WINDOW,
        "num_kv_shared_layers": SHARED,
        "vocab_size_per_layer_input": len(tokenizer),
        "hidden_size_per_layer_input": 8,
        "final_logit_softcapping": 30.0,
        "pad_token_id": 0,
        **options,
    }
    config = Gemma4Config(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
        },
        audio_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [16, 4],
            "output_proj_dims": 32,
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=processor.video_token_id,
        audio_token_id=tokenizer.audio_token_id,
    )
    return randomized(_patched(Gemma4ForConditionalGeneration(config)), attention), processor


def _patched(model: Any) -> PreTrainedModel:
    """The model without two bugs of transformers 5.19, which would hide what is tested.

    `forward` does not pass on the number of frames per video, without which it accepts no video; its value matters to
    neither `forward` nor `generate`, which passes it on. With eager attention the audio tower reads its mask as the
    opposite; it stays with sdpa, as the adapter loads it.
    """
    features, choose = model.model.get_video_features, model.set_attn_implementation

    @wraps(features)
    def with_frames(pixel_values_videos: Any, video_position_ids: Any, num_frames_per_video: Any = None, **more: Any):
        frames = torch.tensor([len(pixel_values_videos)])
        return features(pixel_values_videos, video_position_ids, num_frames_per_video=frames, **more)

    model.model.get_video_features = with_frames
    model.set_attn_implementation = lambda attention: choose(attention_by_tower(attention))
    return model
