"""The adapter of Gemma 4."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import transformers
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import Request
from fastav.errors import MissingTrack
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.models._adapters import layout_from_masks, prompt_ids, with_seconds
from fastav.models._gemma import PIECE, RATE, audio_pieces, gemma_plan, gemma_shape, piece_lengths, token_runs
from fastav.models._official import (
    CHANNELS_LAST,
    OfficialAdapter,
    PreparedRequest,
    refuse_placeholders,
    render_chat,
    sample_video,
)
from fastav.plan import Keep, Plan, Tokens
from fastav.presets import plus, trim

FRAMES, FRAME_TOKENS = 32, 66  # per video, and per frame at 1280 x 720
STEP = 640  # samples per audio token
EXAMPLE_SECONDS = 30.0


class Gemma4Adapter(OfficialAdapter):
    """Gemma 4 E2B and E4B, the sizes that take audio: 32 frames, then the audio in pieces of 30 s, then the question.

    The paper has no settings for this model. The preset `fastav` keeps the first 10 audio tokens and all video, as the
    paper does for VideoLLaMA2, where video also comes before audio. The last 18 of the 42 layers read the keys and
    values of earlier ones, and every sixth layer attends to all tokens. So the cut by position is at layer 12, the
    middle one of those that compute keys and values, and the one fine cut at layer 18; see `gemma_plan`.
    """

    name = "gemma4"
    prefix = 4  # start of text, and the role
    architectures = frozenset({"Gemma4ForConditionalGeneration"})
    checkpoint = "google/gemma-4-E4B-it"
    presets: ClassVar[Mapping[str, Plan]] = {
        "fastav": gemma_plan(Keep(audio=Tokens(10)), position_layer=12, fine_layer=18, has_images=True),
        "fastav-plus": plus(),
        "fastav-trim": trim(),
    }
    config_class = "Gemma4Config"
    model_class = "Gemma4ForConditionalGeneration"
    processor_class = "Gemma4Processor"
    release: ClassVar[Mapping[str, Any]] = {
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 42,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 18,
            "final_logit_softcapping": 30.0,
        },
        "vision_config": {},
        "audio_config": {},
    }

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Model (in evaluation mode) and processor from a local folder or a hub id.

        `attn_implementation` becomes what `attention_by_tower` returns for it.

        Raises: CheckpointError if keys are missing, unexpected, or of another shape, or files cannot be read.
        """
        if isinstance(attention := options.get("attn_implementation"), str):
            options["attn_implementation"] = attention_by_tower(attention)
        return super().load(source, **options)

    def prepare_request(self, processor: Any, request: Request) -> PreparedRequest:
        """The processor's tensors for one request, and its layout.

        Raises: MissingTrack, MediaError.
        """
        placeholders = [processor.video_token, processor.image_token, processor.audio_token]
        refuse_placeholders(request.question, placeholders)
        has_video, has_audio = request.tracks
        if not (has_video or has_audio):
            raise MissingTrack(f"{request.clip.name} has neither a video nor an audio track")
        clip = request.aligned_clip
        video = sample_video(clip.require_video(), processor.video_processor, fps=1) if has_video else None
        pieces = audio_pieces(clip) if has_audio else []
        content = [{"type": "video"}] * has_video + [{"type": "audio"}] * len(pieces)
        options: dict[str, Any] = {}
        if video is not None:
            options = {"videos": [video.frames], "video_metadata": [video.metadata], "do_sample_frames": False}
            options["input_data_format"] = CHANNELS_LAST
        inputs = processor(
            text=[render_chat(processor, [*content, {"type": "text", "text": request.question}])],
            audio=pieces or None,
            audio_kwargs={"max_length": PIECE},  # the extractor's own, which a reloaded processor does not pass
            return_tensors="pt",
            **options,
        )
        (layout,) = _layouts(processor.video_token_id, processor.image_token_id, processor.audio_token_id, inputs)
        start = clip.require_audio().start if has_audio else 0.0
        return PreparedRequest(dict(inputs), _with_seconds(layout, None if video is None else video.seconds, start))

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        settings: Any = config
        return tuple(_layouts(settings.video_token_id, settings.image_token_id, settings.audio_token_id, inputs))

    def example_clip(
        self, config: PreTrainedConfig, seconds: float | None, audio: int | None, video: int | None
    ) -> Layout:
        """A 1280 x 720 clip (30 s unless `seconds` is set), then its audio; without the timestamps between frames."""
        piece_tokens = [n // STEP for n in piece_lengths(EXAMPLE_SECONDS if seconds is None else seconds)]
        frames = FRAMES * FRAME_TOKENS if video is None else video
        return Layout.join(
            [
                Layout.of(Modality.VIDEO, frames, frame=np.arange(frames) // FRAME_TOKENS),
                Layout.of(Modality.AUDIO, sum(piece_tokens) if audio is None else audio),
            ]
        )

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the decoder, in which every sixth layer has full attention and heads twice as large."""
        return gemma_shape(config)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text model."""
        return model.get_submodule("model.language_model")

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The vision and audio towers and their projectors."""
        names = ("vision_tower", "embed_vision", "audio_tower", "embed_audio")
        return tuple(model.get_submodule(f"model.{name}") for name in names)


def attention_by_tower(attention: str) -> dict[str, str]:
    """The attention implementation of each part of the model, if you request this one for the model.

    The audio tower has its own attention, which needs the mask that transformers makes for sdpa. Before 5.23 it reads
    the mask for eager attention, which has another form, as its opposite. Since then it supports eager attention only,
    with the correct mask.
    """
    audio = "sdpa" if transformers.Gemma4AudioModel._supports_sdpa else "eager"
    return {"": attention, "text_config": attention, "vision_config": attention, "audio_config": audio}


def _layouts(video_id: int, image_id: int, audio_id: int, inputs: Mapping[str, Any]) -> Iterator[Layout]:
    """The layout of each prompt. A frame is a run of video tokens: text, at least an end mark, follows each."""
    for ids in prompt_ids(inputs):
        video = ids == video_id
        frame, _ = token_runs(video)
        yield layout_from_masks(video, ids == audio_id, image=ids == image_id, frame=frame)


def _with_seconds(layout: Layout, frames: Float[np.ndarray, " frames"] | None, start: float | int) -> Layout:
    second, video, audio = np.array(layout.second), layout.frame >= 0, layout.modality == Modality.AUDIO
    if frames is not None:
        second[video] = frames[layout.frame[video]]
    number, index = token_runs(audio)
    second[audio] = start + (number[audio] * PIECE + index[audio] * STEP) / RATE
    return with_seconds(layout, second)
