"""The adapter of Gemma 4."""

from collections.abc import Iterator, Mapping, Sequence
from math import isqrt
from typing import Any, ClassVar

import numpy as np
import transformers
from jaxtyping import Float, Float32, Int
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.budgets import Tokens
from fastav.errors import MissingTrack
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.messages import Kind, Media
from fastav.models._adapters import iter_rows, prompt_ids
from fastav.models._boxes import grid_boxes
from fastav.models._gemma import (
    PIECE,
    RATE,
    audio_pieces,
    follows_picture,
    gemma_plan,
    gemma_shape,
    piece_lengths,
    token_runs,
)
from fastav.models._grids import MediaTokens
from fastav.models._official import CHANNELS_LAST, VIDEO_FRAMES, OfficialAdapter, sample_video
from fastav.models._pieces import Pieces, Sample, pieces_of_lengths
from fastav.plan import Keep, Plan
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

    def sample(self, processor: Any, media: Media) -> Sample:
        """A video with its sound in pieces, sound in pieces, or an image.

        Raises: MissingTrack, MediaError.
        """
        if media.kind is Kind.IMAGE:
            return Sample(parts=[{"type": "image"}], images=[media.clip.require_video().read([0])[0]])
        has_video, has_audio = media.tracks
        if not (has_video or has_audio):
            raise MissingTrack(f"{media.name} has neither a video nor an audio track")
        clip = media.aligned_clip
        video = sample_video(clip.require_video(), processor.video_processor, fps=1) if has_video else None
        sounds = audio_pieces(clip, media.name) if has_audio else []
        return Sample(
            parts=[{"type": "video"}] * has_video + [{"type": "audio"}] * len(sounds),
            videos=[] if video is None else [video],
            sounds=sounds,
            seconds=np.zeros(0) if video is None else video.seconds,
            start=clip.require_audio().start if has_audio else 0.0,
        )

    def process(self, processor: Any, text: str, samples: Sequence[Sample]) -> dict[str, Any]:
        """The processor's tensors for a rendered conversation and its media."""
        videos = [video for sample in samples for video in sample.videos]
        images = [image for sample in samples for image in sample.images]
        options: dict[str, Any] = {"images": images} if images else {}
        if videos:
            options |= {"videos": [video.frames for video in videos], "do_sample_frames": False}
            options["video_metadata"] = [video.metadata for video in videos]
        if options:
            options["input_data_format"] = CHANNELS_LAST
        inputs = processor(
            text=[text],
            audio=[sound for sample in samples for sound in sample.sounds] or None,
            audio_kwargs={"max_length": PIECE},  # the extractor's own, which a reloaded processor does not pass
            return_tensors="pt",
            **options,
        )
        return dict(inputs)

    def placeholders(self, processor: Any) -> Sequence[str]:
        """The words that stand for media."""
        return [processor.video_token, processor.image_token, processor.audio_token]

    def media_tokens(self, processor: Any) -> MediaTokens:
        """The ids of media tokens, from the processor."""
        return _tokens(processor)

    def config_tokens(self, config: Any) -> MediaTokens:
        """The ids of media tokens, from the model's configuration."""
        return _tokens(config)

    def pieces(self, media_tokens: MediaTokens, inputs: Mapping[str, Any]) -> Iterator[Pieces]:
        """The media tokens of each prompt.  A frame is a run of video tokens: text, at least an end mark, follows each.

        Without `VIDEO_FRAMES`, all frames of a prompt are of one video.
        """
        frames_of_videos = (int(n) for n in iter_rows(inputs, VIDEO_FRAMES))
        of_frames, of_images = _positions(inputs, "video_position_ids"), _positions(inputs, "image_position_ids")
        for ids in prompt_ids(inputs):
            run, image = token_runs(ids == media_tokens.video), token_runs(ids == media_tokens.image)
            frames = np.arange(run.max() + 1)
            video_of_frame = pieces_of_lengths(np.ones(len(frames), bool), frames_of_videos)
            start = np.searchsorted(video_of_frame, video_of_frame)
            yield Pieces(
                video=np.append(video_of_frame, -1)[run],
                image=image,
                audio=token_runs(ids == media_tokens.audio),
                frame=np.append(frames - start, -1)[run],
                joins=follows_picture,
                box=np.where((image >= 0)[:, None], _boxes(image, of_images), _boxes(run, of_frames)),
            )

    def audio_seconds(
        self, sound: Int[np.ndarray, " tokens"], index: Int[np.ndarray, " tokens"]
    ) -> Float[np.ndarray, " tokens"]:
        """Start of audio tokens in their track, in seconds."""
        return (sound * PIECE + index * STEP) / RATE

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


def _positions(inputs: Mapping[str, Any], name: str) -> Iterator[Int[np.ndarray, "patches 2"]]:
    """The positions of the patches of each picture; transformers 5.17 has a row for each video, not for each frame."""
    for row in iter_rows(inputs, name):
        yield from row.reshape(-1, *row.shape[-2:])


def _boxes(
    picture: Int[np.ndarray, " tokens"], positions: Iterator[Int[np.ndarray, "patches 2"]]
) -> Float32[np.ndarray, "tokens 4"]:
    """The boxes of the tokens of pictures, whose patches are pooled in squares; NaN where patches and tokens differ.

    picture: of each token, -1 for none. positions: column and row of each patch of the next pictures, -1 for padding.
    """
    box = np.full((len(picture), 4), np.nan, np.float32)
    for number in range(picture.max(initial=-1) + 1):
        if (patches := next(positions, None)) is None:
            break
        columns, rows = (int(n) + 1 for n in patches.max(0))
        member = picture == number
        side = isqrt(rows * columns // max(1, int(member.sum())))
        if side and rows // side * (columns // side) == member.sum():
            box[member] = grid_boxes(rows // side, columns // side)
    return box


def _tokens(settings: Any) -> MediaTokens:
    return MediaTokens(
        video=settings.video_token_id,
        image=settings.image_token_id,
        audio=settings.audio_token_id,
        merge=1,
        temporal=1,
    )
