"""A tiny Gemma 3n: layers of both kinds, a window shorter than a prompt, and layers that share keys and values.

Its vision tower is from the timm library; a small ConvNeXt takes the place of MobileNet-v5.
"""

from transformers import (
    Gemma3nAudioFeatureExtractor,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step
from support.families._tiny import TEXT, byte_tokenizer, randomized, template

DEPTH, SHARED, WINDOW = 20, 4, 24
SIDE, TOKENS = 128, 16  # pixels a side of an image, and its tokens


def plan(first: float, later: float) -> Plan:
    """One cut by position, and fine cuts after layers of full attention."""
    cut = Step(layers="8", method="position", keep=Keep(media=Share(first)))
    fine = (Step(layers=n, method="last-query", keep=Keep(media=Share(later))) for n in ("10", "15"))
    return Plan((cut, *fine), "tiny")


PLAN, EVERYTHING = plan(0.6, 0.7), plan(1.0, 1.0)


def build(attention: str = "sdpa") -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = byte_tokenizer(
        boi_token="<image>",
        boa_token="<audio>",
        eoi_token="</image>",  # first token of images; each tower embeds its own tokens
        image_token="<|image|>",
        eoa_token="</audio>",  # first token of audio
        audio_token="<|audio|>",
    )
    images, sounds = tokenizer.eoi_token_id, tokenizer.eoa_token_id
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(feature_size=16, max_frequency=4000.0),
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        chat_template=template(image="<|image|>", audio="<|audio|>"),
        image_seq_length=TOKENS,
    )
    config = Gemma3nConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer) + 1,  # the last one is audio padding
            "num_hidden_layers": DEPTH,
            "head_dim": 16,
            "layer_types": [*["sliding_attention"] * 4, "full_attention"] * (DEPTH // 5),
            "sliding_window": WINDOW,
            "num_kv_shared_layers": SHARED,
            "vocab_size_per_layer_input": images,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 3,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5] * 2 + [0.0] * (DEPTH - 2),
            "pad_token_id": 0,
        },
        vision_config={
            "architecture": "convnext_atto",
            "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 32]},
            "hidden_size": 32,
            "vocab_size": sounds - images,
            "vocab_offset": images,
        },
        audio_config={
            "hidden_size": 32,
            "input_feat_size": 16,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 4],
            "vocab_size": len(tokenizer) + 1 - sounds,
            "vocab_offset": sounds,
        },
        image_token_id=tokenizer.image_token_id,
        audio_token_id=tokenizer.audio_token_id,
        vision_soft_tokens_per_image=TOKENS,
    )
    return randomized(Gemma3nForConditionalGeneration(config), attention), processor
