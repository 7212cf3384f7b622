"""What is measured: a model, known by its configuration alone, and the prompts that it gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedConfig

from fastav import pipelines
from fastav.adapter import ModelAdapter
from fastav.budgets import Before
from fastav.errors import FastAVError
from fastav.layout import Layout, Modality
from fastav.models.videollama2 import VideoLlama2Adapter, VideoLlama2Config
from fastav.plan import Keep, Plan
from fastav.presets import fastav, plus, trim

TEXT = 44  # tokens of a short question within a chat template
TINY_ENCODERS: Mapping[str, Any] = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "beats_config": {
        "embed_dim": 16,
        "encoder_layers": 1,
        "encoder_embed_dim": 16,
        "encoder_ffn_embed_dim": 16,
        "encoder_attention_heads": 2,
        "conv_pos": 16,
        "conv_pos_groups": 2,
    },
    "mm_hidden_size": 16,
    "mm_hidden_size_a": 16,
}


class SmallAdapter(VideoLlama2Adapter):
    """A decoder of VideoLLaMA2's kind that one CPU core prefills in seconds; it was never trained."""

    name = "small"
    presets: ClassVar[Mapping[str, Plan]] = {
        "fastav": fastav(Keep(media=Before(750))),
        "fastav-plus": plus(),
        "fastav-trim": trim(),
    }
    prompt: ClassVar[int] = 4096

    def config(self, source: str | None = None) -> VideoLlama2Config:
        """16 layers, 512 wide."""
        return VideoLlama2Config(
            **TINY_ENCODERS,
            vocab_size=1024,
            hidden_size=512,
            hidden_size_a=512,
            intermediate_size=1536,
            num_hidden_layers=16,
            num_attention_heads=8,
            num_key_value_heads=4,
        )

    def example(
        self,
        config: PreTrainedConfig,
        *,
        seconds: float | int | None = None,
        audio: int | None = None,
        video: int | None = None,
        text: int,
    ) -> Layout:
        """4,096 tokens: two thirds of the media are video, and half of the audio is padding."""
        media = self.prompt - text
        video = 2 * media // 3 if video is None else video
        audio = media - 2 * media // 3 if audio is None else audio
        before = text // 4
        return Layout.join(
            [
                Layout.of(Modality.TEXT, before),
                Layout.of(Modality.VIDEO, video),
                Layout.of(Modality.AUDIO, audio, padding=np.arange(audio) >= audio // 2),
                Layout.of(Modality.TEXT, text - before),
            ]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model without weights.  name: also a part of the report's file name."""

    name: str
    adapter: ModelAdapter
    config: PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec:
    """A prompt.  name: `example` for the family's typical prompt, else its seconds or tokens."""

    name: str
    layout: Layout


def model_spec(model: str) -> ModelSpec:
    """The model of this name: `small`, or what `fastav.pipeline` takes.  Raises: UnsupportedModel, CheckpointError."""
    if model == SmallAdapter.name:
        adapter = SmallAdapter()
        return ModelSpec(name=model, adapter=adapter, config=adapter.config())
    known, _, config = pipelines.resolve(model)
    return ModelSpec(name=PurePath(model).name, adapter=known, config=config)


def prompt_specs(
    model: ModelSpec, *, tokens: Sequence[int] = (), seconds: Sequence[float | int] = ()
) -> tuple[PromptSpec, ...]:
    """A prompt of each length, in tokens or in seconds of its clip; the family's typical one if no length is given.

    Raises: FastAVError for lengths that leave no room for a clip.
    """
    example = partial(model.adapter.example, model.config, text=TEXT)
    prompts = [PromptSpec(name=f"{n}", layout=_of_length(model, n)) for n in tokens]
    prompts += [PromptSpec(name=f"{s:g}s", layout=example(seconds=float(s))) for s in seconds]
    return tuple(prompts) or (PromptSpec(name="example", layout=example()),)


def _of_length(model: ModelSpec, tokens: int) -> Layout:
    """A prompt of this many tokens, with the family's typical share of audio."""
    if tokens < 2 * TEXT:
        raise FastAVError(f"a prompt of {tokens} tokens has no room for a clip", f"--tokens {2 * TEXT} or more")
    typical = model.adapter.example(model.config, text=TEXT)
    media = tokens - TEXT
    n_audio = round(media * typical.count(Modality.AUDIO) / (len(typical) - typical.count(Modality.TEXT)))
    # the example of a family without an audio encoder takes no `audio`, not even 0
    audio = {"audio": n_audio} if typical.count(Modality.AUDIO) else {}
    return model.adapter.example(model.config, video=media - n_audio, text=TEXT, **audio)
