"""A tiny Gemma 4 like the larger sizes: tokens of a frame attend to each other, no layers share keys and values."""

from transformers import PreTrainedModel, ProcessorMixin

from support.families import gemma4

PLAN, EVERYTHING = gemma4.PLAN, gemma4.EVERYTHING


def build(attention: str = "sdpa") -> tuple[PreTrainedModel, ProcessorMixin]:
    return gemma4.build(attention, use_bidirectional_attention="vision", num_kv_shared_layers=0)
