"""A tiny VideoLLaMA3."""

from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
)
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from support.families._tiny import TEXT, byte_tokenizer, randomized, template

PIXELS = {"shortest_edge": 8 * 8, "longest_edge": 6 * 32 * 24}


def build(attention: str = "sdpa") -> tuple[PreTrainedModel, ProcessorMixin]:
    words = ("<|image_pad|>", "<|video_pad|>")
    tokenizer = byte_tokenizer(*words)
    image, video = tokenizer.convert_tokens_to_ids(list(words))
    sizes = {"size": PIXELS, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 1}
    processor = VideoLlama3Processor(
        VideoLlama3ImageProcessorPil(**sizes),
        tokenizer,
        VideoLlama3VideoProcessor(**sizes),
        chat_template=template(video="<|video_pad|>", image="<|image_pad|>"),
    )
    config = VideoLlama3Config(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
        },
        image_token_id=image,
        video_token_id=video,
    )
    return randomized(VideoLlama3ForConditionalGeneration(config), attention), processor
