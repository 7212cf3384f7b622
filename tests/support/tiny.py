"""A tiny Qwen2 decoder with made-up audio and video tokens, and an adapter that knows them."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin, Qwen2Config, Qwen2ForCausalLM

from fastav.adapter import EncoderAttention, EncoderCall, ModelAdapter, Prepared
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.plan import Plan
from fastav.request import Request
from support import flash

AUDIO_ID, VIDEO_ID = 62, 63


class TinyAdapter(ModelAdapter):
    """Ids 62 and 63 are audio and video; video comes in frames of four tokens, odd audio tokens are padding."""

    name = "tiny"
    architectures = frozenset({"Qwen2ForCausalLM"})
    checkpoint = ""
    presets: ClassVar[Mapping[str, Plan]] = {}

    def config(self, source: str | None = None) -> PreTrainedConfig:
        return Qwen2Config()

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        raise AssertionError("the tiny model is made, not loaded")

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        raise AssertionError("not used")

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        raise AssertionError("the tiny model has no processor")

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        ids = inputs["input_ids"].cpu()
        mask = inputs.get("attention_mask")
        real = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :].cpu()
        return tuple(layout_of(row[keep.bool()]) for row, keep in zip(ids, real, strict=True))

    def example_clip(
        self, config: PreTrainedConfig, seconds: float | None, audio: int | None, video: int | None
    ) -> Layout:
        raise AssertionError("not used")

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        raise AssertionError("not used")

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return model.model

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        return ()

    def audio_attention(self) -> EncoderAttention:
        return Waves(Modality.AUDIO, AUDIO_ID)

    def vision_attention(self) -> EncoderAttention:
        return Waves(Modality.VIDEO, VIDEO_ID)


class Waves(EncoderAttention):
    """The decoder has no encoders: here its embedding stands for one, and attention goes up and down with time."""

    def __init__(self, modality: Modality, token: int) -> None:
        self.modalities, self.token = (modality,), token

    def modules(self, model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
        return model.model.embed_tokens, model.model.embed_tokens

    def scores(self, attention: nn.Module, call: EncoderCall, attention_inputs: Mapping[str, Any]) -> Tensor:
        here = attention_inputs["input"] == self.token
        return waves(here.cumsum(1)[here])


def waves(number: Tensor) -> Tensor:
    """The attention of the n-th token of its modality in a prompt, from 1."""
    return (number * 2.4).sin() + 1


def layout_of(ids: Tensor) -> Layout:
    """The layout of one unpadded row."""
    row = ids.numpy()
    video, audio = row == VIDEO_ID, row == AUDIO_ID
    modality = np.where(video, Modality.VIDEO, np.where(audio, Modality.AUDIO, Modality.TEXT)).astype(np.int8)
    return Layout(
        modality=modality,
        item=np.where(modality == Modality.TEXT, -1, 0).astype(np.int32),
        second=np.full(len(row), np.nan, np.float32),
        frame=np.where(video, (np.cumsum(video) - 1) // 4, -1).astype(np.int32),
        padding=audio & (np.cumsum(audio) % 2 == 0),
        box=np.full((len(row), 4), np.nan, np.float32),
    )


def tiny_model(attention: str = "sdpa", seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """Six layers with attention far from uniform, so that scores differ clearly."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        **{
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.25,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        | changes
    )
    if attention == flash.NAME:
        flash.register()
    model = Qwen2ForCausalLM(config).eval()
    model.config._attn_implementation_internal = attention  # by the setter, transformers would look for a kernel
    return model


def prompt(before: int = 3, video: int = 16, audio: int = 12, after: int = 5, seed: int = 0) -> Tensor:
    """Text, video, audio, text: ids of shape [1, tokens]."""
    make = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 60, (before + after,), generator=make)
    media = torch.tensor([VIDEO_ID] * video + [AUDIO_ID] * audio, dtype=torch.long)
    return torch.cat([text[:before], media, text[before:]])[None]


def pad_left(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """A left-padded batch of rows of shape [1, tokens]."""
    length = max(row.shape[1] for row in rows)
    ids = torch.cat([nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows])
    mask = torch.cat([nn.functional.pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
