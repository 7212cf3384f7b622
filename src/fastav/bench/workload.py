"""What is run: a model of random weights, a prompt of random content, and the plans that prune it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastav.engines.transformers import prune
from fastav.layout import Layout, Modality
from fastav.models.videollama2 import VideoLlama2Adapter, VideoLlama2Config, VideoLlama2ForConditionalGeneration
from fastav.plan import Before, Keep, Plan, Share, Step, Tokens
from fastav.presets import NONE, fastav, trim

ADAPTER = VideoLlama2Adapter()
_TINY_ENCODERS = {
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model and a prompt.

    config: what differs from the release. text: its tokens. media: tokens of audio and video together, two thirds of
    them video and half of the audio padding; None to encode a clip, which gives as many as the model's scheme says.
    batches: batch sizes. keep: what stays at the global cut.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    text: int
    media: int | None
    batches: tuple[int, ...]
    keep: Keep

    def layout(self, config: VideoLlama2Config) -> Layout:
        """Text, video, audio, text."""
        if self.media is None:
            return ADAPTER.example(config, audio=None, video=None, text=self.text)
        video = 2 * self.media // 3
        audio = self.media - video
        return Layout.join(
            [
                Layout.of(Modality.TEXT, self.text // 4),
                Layout.of(Modality.VIDEO, video),
                Layout.of(Modality.AUDIO, audio, padding=np.arange(audio) >= audio // 2),
                Layout.of(Modality.TEXT, self.text - self.text // 4),
            ]
        )

    def plans(self) -> tuple[Plan, ...]:
        """Unpruned first; then hooks and scores without a cut, which shows what those cost alone; then what prunes."""
        everything = Keep(media=Share(1.0))
        hooks = (
            Step(layers="middle", method="position", keep=everything),
            Step(layers="middle+1..", method="last-query", keep=everything),
        )
        return (
            NONE,
            Plan(hooks, "hooks only"),
            fastav(self.keep, drop=0, name="global only"),
            fastav(self.keep, drop=0.2),
            trim(),
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="tiny",
            config=_TINY_ENCODERS
            | {
                "vocab_size": 64,
                "hidden_size": 32,
                "hidden_size_a": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_frames": 64,
                "most_frames": 64,
                "audio_seconds": 2,
                "audio_clips": 1,
                "audio_clip_seconds": 1,
            },
            text=20,
            media=None,
            batches=(1, 2),
            keep=Keep(audio=Tokens(10)),
        ),
        Shape(
            name="small",
            config=_TINY_ENCODERS
            | {
                "vocab_size": 1024,
                "hidden_size": 512,
                "hidden_size_a": 512,
                "intermediate_size": 1536,
                "num_hidden_layers": 16,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
            },
            text=128,
            media=4096 - 128,
            batches=(1,),
            keep=Keep(media=Before(750)),
        ),
        Shape(name="videollama2", text=44, media=None, batches=(1, 4), keep=Keep(audio=Tokens(10))),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model, and a batch of prompts in both forms: as embeddings, and as ids with media to encode (None without)."""

    model: VideoLlama2ForConditionalGeneration
    layout: Layout
    batch: int
    embeds: Tensor
    raw: Mapping[str, Tensor] | None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.embeds.device

    @property
    def prompt(self) -> dict[str, Tensor]:
        """What `generate` is given."""
        return {"inputs_embeds": self.embeds} if self.raw is None else dict(self.raw)

    @contextmanager
    def pruned(self, plan: Plan) -> Iterator[None]:
        """While active, the model is pruned by the plan, or untouched if it has no step."""
        if not plan.steps:
            yield
            return
        with prune(self.model, plan, layouts=[self.layout] * self.batch, adapter=ADAPTER):
            yield


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> VideoLlama2ForConditionalGeneration:
    """Random weights, made on the device; nothing ends an answer early."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None} | dict(shape.config)
    config = VideoLlama2Config(**settings)
    with torch.device(device):
        model = VideoLlama2ForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


@torch.inference_mode()
def build(shape: Shape, model: VideoLlama2ForConditionalGeneration, batch: int) -> Workload:
    """A batch of prompts of random content."""
    config, device, dtype = model.config, model.device, model.dtype
    layout = shape.layout(config)
    if shape.media is not None:
        embeds = torch.randn(batch, len(layout), config.hidden_size, device=device, dtype=dtype)
        return Workload(model=model, layout=layout, batch=batch, embeds=embeds, raw=None)
    scheme = config.scheme
    placeholder = {Modality.VIDEO: scheme.video_token_id, Modality.AUDIO: scheme.audio_token_id, Modality.TEXT: 1}
    row = torch.tensor([placeholder[Modality(m)] for m in layout.modality], device=device)
    side = scheme.image_size
    raw = {
        "input_ids": row.expand(batch, -1).contiguous(),
        "pixel_values_videos": torch.randn(batch, scheme.num_frames, 3, side, side, device=device, dtype=dtype),
        "input_features": torch.randn(batch, scheme.fbank_rows, scheme.mel_bins, device=device, dtype=dtype),
    }
    return Workload(model=model, layout=layout, batch=batch, embeds=model.model.embed(**raw), raw=raw)


def describe(shape: Shape, workload: Workload) -> dict[str, Any]:
    """The shape as JSON holds it."""
    decoder = ADAPTER.shape(workload.model.config)
    return {
        "name": shape.name,
        "decoder": asdict(decoder),
        "prompt": workload.layout.by_modality(),
        "padding": int(workload.layout.padding.sum()),
        "dtype": str(workload.model.dtype).removeprefix("torch."),
        "plans": {plan.name: [step.to_dict() for step in plan.steps] for plan in shape.plans()},
    }
