"""A tiny sparse Qwen3-VL."""

from transformers import PreTrainedModel, ProcessorMixin, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from support.families._tiny import randomized
from support.families.qwen3_vl import parts

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def build(attention: str = "sdpa") -> tuple[PreTrainedModel, ProcessorMixin]:
    processor, config = parts()
    config["text_config"] |= EXPERTS
    return randomized(Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config)), attention), processor
