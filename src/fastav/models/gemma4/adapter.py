"""What the rest of fastav must know about Gemma 4."""

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
from fastav.models._adapters import of_places, prompts_of, with_seconds
from fastav.models._gemma import PIECE, RATE, gemma_plan, gemma_shape, lengths, pieces, runs
from fastav.models._official import CHANNELS_LAST, OfficialAdapter, Row, refuse_written_placeholders, rendered, sampled
from fastav.plan import Keep, Plan, Tokens
from fastav.presets import plus, trim

FRAMES, FRAME_TOKENS = 32, 66  # of a video, and of one of its frames at 1280 x 720
STEP = 640  # samples of an audio token
PREFIX = 4  # tokens before the clip: the start of the text and who speaks
EXAMPLE_SECONDS = 30.0


class Gemma4Adapter(OfficialAdapter):
    """Gemma 4 of the sizes that hear, E2B and E4B: 32 frames of the video, its sound in pieces of 30 s, the question.

    The paper has no settings for it. The preset `fastav` keeps, as the paper does for VideoLLaMA2, whose video stands
    before its sound, too, the first 10 audio tokens and all video. Of its 42 layers the last 18 read the keys and
    values of earlier ones, and every sixth attends to all tokens. So the cut by position enters layer 12, the middle
    one of those with keys and values of their own, and the one fine cut layer 18; see `gemma_plan`.
    """

    name = "gemma4"
    architectures = frozenset({"Gemma4ForConditionalGeneration"})
    checkpoint = "google/gemma-4-E4B-it"
    presets: ClassVar[Mapping[str, Plan]] = {
        "fastav": gemma_plan(Keep(audio=Tokens(10)), first=12, later=18, images=True),
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
        """Model (in evaluation mode) and processor from a local folder or a hub id; see `by_tower` for its attention.

        Raises: CheckpointError if keys are missing, left over, or of another shape, or files cannot be read.
        """
        if isinstance(attention := options.get("attn_implementation"), str):
            options["attn_implementation"] = by_tower(attention)
        return super().load(source, **options)

    def row(self, processor: Any, request: Request) -> Row:
        """The processor's tensors for one request, and its layout.

        Raises: MissingTrack, MediaError.
        """
        words = [processor.video_token, processor.image_token, processor.audio_token]
        refuse_written_placeholders(request.question, words)
        seen, heard = request.tracks
        if not (seen or heard):
            raise MissingTrack(f"{request.clip.name} has neither a video nor an audio track")
        shown = request.aligned_clip
        clip = sampled(shown.require_video(), processor.video_processor, fps=1) if seen else None
        sounds = pieces(shown) if heard else []
        content = [{"type": "video"}] * seen + [{"type": "audio"}] * len(sounds)
        options: dict[str, Any] = {}
        if clip is not None:
            options = {"videos": [clip.frames], "video_metadata": [clip.metadata], "do_sample_frames": False}
            options["input_data_format"] = CHANNELS_LAST
        inputs = processor(
            text=[rendered(processor, [*content, {"type": "text", "text": request.question}])],
            audio=sounds or None,
            audio_kwargs={"max_length": PIECE},  # the extractor's own; a reloaded processor hands it none
            return_tensors="pt",
            **options,
        )
        (layout,) = _layouts(processor.video_token_id, processor.image_token_id, processor.audio_token_id, inputs)
        start = shown.require_audio().start if heard else 0.0
        return Row(dict(inputs), _timed(layout, None if clip is None else clip.seconds, start))

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        known: Any = config
        return tuple(_layouts(known.video_token_id, known.image_token_id, known.audio_token_id, inputs))

    def example(
        self,
        config: PreTrainedConfig,
        *,
        seconds: float | int | None = None,
        audio: int | None = None,
        video: int | None = None,
        text: int,
    ) -> Layout:
        """A typical prompt about a clip of 30 s at 1280 x 720: some text, video, sound, the rest of the text.

        The text between frames, which tells their times, is left out.
        """
        sounds = [n // STEP for n in lengths(EXAMPLE_SECONDS if seconds is None else seconds)]
        frames = FRAMES * FRAME_TOKENS if video is None else video
        before = min(PREFIX, text)
        return Layout.join(
            [
                Layout.of(Modality.TEXT, before),
                Layout.of(Modality.VIDEO, frames, frame=np.arange(frames) // FRAME_TOKENS),
                Layout.of(Modality.AUDIO, sum(sounds) if audio is None else audio),
                Layout.of(Modality.TEXT, text - before),
            ]
        )

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the decoder; its layers of full attention, one of six, have heads twice as large."""
        return gemma_shape(config)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text model."""
        return model.get_submodule("model.language_model")

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The towers for video and audio, and what brings them to the decoder's width."""
        names = ("vision_tower", "embed_vision", "audio_tower", "embed_audio")
        return tuple(model.get_submodule(f"model.{name}") for name in names)


def by_tower(attention: str) -> dict[str, str]:
    """The attention of each part of the model, where this one is asked for.

    The audio tower has an attention of its own, which wants the mask that transformers makes for sdpa. Before 5.23 it
    takes the mask for eager attention, which is of another form, for its opposite; since then it knows eager alone and
    makes the right one.
    """
    audio = "sdpa" if transformers.Gemma4AudioModel._supports_sdpa else "eager"
    return {"": attention, "text_config": attention, "vision_config": attention, "audio_config": audio}


def _layouts(video_id: int, image_id: int, audio_id: int, inputs: Mapping[str, Any]) -> Iterator[Layout]:
    """A frame is a run of video tokens: text, at least what marks its end, follows each."""
    for ids in prompts_of(inputs):
        video = ids == video_id
        frame, _ = runs(video)
        yield of_places(video, ids == audio_id, image=ids == image_id, frame=frame)


def _timed(layout: Layout, frames: Float[np.ndarray, " frames"] | None, start: float | int) -> Layout:
    second, video, audio = np.array(layout.second), layout.frame >= 0, layout.modality == Modality.AUDIO
    if frames is not None:
        second[video] = frames[layout.frame[video]]
    number, place = runs(audio)
    second[audio] = start + (number[audio] * PIECE + place[audio] * STEP) / RATE
    return with_seconds(layout, second)
