"""A tiny Phi-4-multimodal. Its processor assumes 16 x 16 tokens per crop, so a crop has 32 x 32 patches."""

from transformers import (
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from support.families._tiny import TEXT, byte_tokenizer, randomized, template

SOUND = 33_600  # samples of each clip: the encoder's output for audio depends on other lengths in the batch
FPS = 20  # gives two images of one clip and one of the other, with some 500 tokens each


def build(attention: str = "sdpa") -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = byte_tokenizer(image_token="<|image|>", audio_token="<|audio|>")
    tokenizer.chat_template = template()
    processor = Phi4MultimodalProcessor(
        Phi4MultimodalImageProcessor(size={"height": 64, "width": 64}, patch_size=2),
        Phi4MultimodalFeatureExtractor(feature_size=16),
        tokenizer,
    )
    config = Phi4MultimodalConfig(
        **{**TEXT, "eos_token_id": [], "pad_token_id": 0},
        vocab_size=len(tokenizer),
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "crop_size": 64,
            "patch_size": 2,
            "image_token_id": tokenizer.image_token_id,
        },
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 16,
            "input_size": 16,
            "audio_token_id": tokenizer.audio_token_id,
        },
        merged_adapter="vision-lora",  # its weights need no vision LoRA
    )
    return randomized(Phi4MultimodalForCausalLM(config), attention), processor
