"""A tiny Qwen3-VL."""

from typing import Any

from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from support.families._tiny import TEXT, byte_tokenizer, randomized, template

FRAME = 32 * 24  # pixels


def parts() -> tuple[ProcessorMixin, dict[str, Any]]:
    """A processor, and the arguments of a configuration that fits it, dense or sparse."""
    words = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = byte_tokenizer(*words)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(words))
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**sizes, size={"shortest_edge": 16 * 16, "longest_edge": FRAME}),
        tokenizer,
        Qwen3VLVideoProcessor(
            **sizes,
            size={"shortest_edge": 16 * 16, "longest_edge": 8 * FRAME},
            cap_pixels_per_frame=True,
        ),
        chat_template=template(
            video="<|vision_start|><|video_pad|><|vision_end|>", image="<|vision_start|><|image_pad|><|vision_end|>"
        ),
    )
    config = {
        "text_config": {
            **TEXT,
            "head_dim": 16,
            "vocab_size": len(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": TEXT["hidden_size"],
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
    }
    return processor, config


def build(attention: str = "sdpa") -> tuple[PreTrainedModel, ProcessorMixin]:
    processor, config = parts()
    return randomized(Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config)), attention), processor
