"""A tiny Qwen2.5-VL."""

from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from support.families._tiny import TEXT, byte_tokenizer, randomized, template

PIXELS = {"shortest_edge": 16 * 16, "longest_edge": 32 * 24}


def build(attention: str = "sdpa") -> tuple[PreTrainedModel, ProcessorMixin]:
    words = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = byte_tokenizer(*words)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(words))
    sizes = {"size": PIXELS, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(**sizes),
        tokenizer,
        Qwen2VLVideoProcessor(**sizes, cap_pixels_per_frame=True),
        chat_template=template(
            video="<|vision_start|><|video_pad|><|vision_end|>", image="<|vision_start|><|image_pad|><|vision_end|>"
        ),
    )
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": TEXT["hidden_size"],
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [0],
            "tokens_per_second": 2,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return randomized(Qwen2_5_VLForConditionalGeneration(config), attention), processor
