"""What the rest of fastav must know about video-SALMONN 2+."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import ModelAdapter, Prepared, Request
from fastav.errors import CheckpointError
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.models._adapters import host, of_places, prompts_of, qwen2_shape, with_seconds
from fastav.models._checkpoint import load, readable
from fastav.models.video_salmonn2_plus.configuration import VideoSalmonn2PlusConfig
from fastav.models.video_salmonn2_plus.modeling import VideoSalmonn2PlusForConditionalGeneration
from fastav.models.video_salmonn2_plus.processing import VideoSalmonn2PlusProcessor
from fastav.models.video_salmonn2_plus.scheme import (
    PIECE_TOKENS,
    RATE,
    TOKEN_ROWS,
    TOKENS_PER_SECOND,
    Scheme,
    audio_per_step,
    audio_tokens,
)
from fastav.plan import Keep, Plan, Share
from fastav.presets import fastav, plus, trim

ORIGINAL = "video_SALMONN2_plus"
PREFIX = 15  # tokens before the clip: the system message, the start of the user's, and of the vision block
EXAMPLE_SECONDS, EXAMPLE_SIZE = 40.0, (720, 1280)
KEPT = 0.4  # the share of the clip that the paper keeps of video-SALMONN 2: 4 of its 10 frames


class VideoSalmonn2PlusAdapter(ModelAdapter):
    """video-SALMONN 2+, the one that is built on Qwen2.5-VL.

    It sees a clip, with or without its sound; sound alone is refused, because how the original takes it is not known
    here. The paper has no settings for this model; the preset `fastav` keeps the share that it keeps of
    video-SALMONN 2, the first 40 % of the clip's tokens, which follow its time.
    """

    name = "video-salmonn2-plus"
    architectures = frozenset({ORIGINAL, "VideoSalmonn2PlusForConditionalGeneration"})
    checkpoint = "tsinghua-ee/video-SALMONN-2_plus_7B"
    steps_wait = False
    presets: ClassVar[Mapping[str, Plan]] = {
        "fastav": fastav(Keep(media=Share(KEPT))),
        "fastav-plus": plus(),
        "fastav-trim": trim(),
    }

    def config(self, source: str | None = None) -> VideoSalmonn2PlusConfig:
        """The configuration in a local folder or hub id; of the released 7B, without any download, if None."""
        if source is None:
            return VideoSalmonn2PlusConfig(architectures=[ORIGINAL])
        with readable(source):
            return VideoSalmonn2PlusConfig.from_pretrained(source)

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Model (in evaluation mode) and processor from a local folder or a hub id.

        Raises: CheckpointError if keys are missing, left over, or of another shape, or files cannot be read.
        """
        return load(
            source,
            options,
            config=VideoSalmonn2PlusConfig,
            processor=VideoSalmonn2PlusProcessor,
            model=VideoSalmonn2PlusForConditionalGeneration,
        )

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of this configuration whose weights are not loaded."""
        _scheme(config)
        known: Any = config
        return VideoSalmonn2PlusForConditionalGeneration(known)

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests.

        Raises: CheckpointError for another model's processor; MissingTrack for a clip without video.
        """
        if not isinstance(processor, VideoSalmonn2PlusProcessor):
            raise CheckpointError(
                f"{self.name} needs a VideoSalmonn2PlusProcessor, got {type(processor).__name__}",
                "use the one `load` gave",
            )
        clips = [processor.read(request) for request in requests]
        inputs = processor(
            [processor.prompt(request.question) for request in requests],
            **processor.media_arguments(clips),
        )
        layouts = _layouts(processor.media, inputs)
        return Prepared(
            inputs=dict(inputs),
            layouts=tuple(_timed(layout, clip) for layout, clip in zip(layouts, clips, strict=True)),
        )

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        return tuple(_layouts(_scheme(config), inputs))

    def example(
        self,
        config: PreTrainedConfig,
        *,
        seconds: float | int | None = None,
        audio: int | None = None,
        video: int | None = None,
        text: int,
    ) -> Layout:
        """A typical prompt: some text, a clip of 40 s at 1280 x 720 with its sound, the rest of the text."""
        scheme = _scheme(config)
        seconds = float(EXAMPLE_SECONDS if seconds is None else seconds)
        frames = scheme.frames(seconds)
        steps, height, width = scheme.grid(frames, *scheme.size(frames, *EXAMPLE_SIZE))
        tokens = steps * height * width if video is None else video
        sound = audio_tokens(int(seconds * RATE)) if audio is None else audio
        heard = seconds * TOKENS_PER_SECOND if audio is None else sound
        parts, done, seen = [Layout.of(Modality.TEXT, before := min(PREFIX, text))], 0, 0
        used = max(1, -(-tokens // (height * width)))
        step_seconds = scheme.step_seconds(frames, seconds)
        for step, count in enumerate(audio_per_step(used, step_seconds, sound)):
            shown = min(height * width, tokens - seen)
            frame = scheme.temporal * step if tokens else -1
            padding = np.arange(done, done + count) >= heard
            parts.append(Layout.of(Modality.VIDEO, shown, frame=np.full(shown, frame)))
            parts.append(Layout.of(Modality.AUDIO, count, frame=np.full(count, frame), padding=padding))
            done, seen = done + count, seen + shown
        return Layout.join([*parts, Layout.of(Modality.TEXT, text - before)])

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the Qwen2.5 decoder."""
        return qwen2_shape(config)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """Qwen2.5-VL's text model."""
        return model.get_submodule("model")

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The vision tower with its merger; Whisper's encoder with the Q-Former and its projection."""
        return model.get_submodule("visual"), model.get_submodule("audio")


def _scheme(config: PreTrainedConfig) -> Scheme:
    if not isinstance(config, VideoSalmonn2PlusConfig):
        raise CheckpointError(f"video-salmonn2-plus needs a VideoSalmonn2PlusConfig, got {type(config).__name__}")
    return config.scheme


def _timed(layout: Layout, clip: Mapping[str, Any]) -> Layout:
    second = np.array(layout.second)
    video, audio = layout.modality == Modality.VIDEO, layout.modality == Modality.AUDIO
    starts = clip["step_starts"]
    second[video] = np.repeat(starts, video.sum() // len(starts))
    second[audio] = np.arange(audio.sum()) / TOKENS_PER_SECOND
    return with_seconds(layout, second)


def _layouts(scheme: Scheme, inputs: Mapping[str, Any]) -> Iterator[Layout]:
    sizes, sounds = inputs.get("video_grid_thw"), inputs.get("feature_attention_mask")
    grids = iter([] if sizes is None else host(sizes).tolist())
    heard = iter([] if sounds is None else host(sounds).astype(bool))
    for ids in prompts_of(inputs):
        yield _layout(scheme, ids, grids, heard)


def _layout(scheme: Scheme, ids: np.ndarray, grids: Iterator[list[int]], heard: Iterator[np.ndarray]) -> Layout:
    video, audio = ids == scheme.video_token_id, ids == scheme.audio_token_id
    frame, padding = np.full(len(ids), -1), np.zeros(len(ids), bool)
    grid = next(grids, None) if video.any() else None
    if grid is not None:
        _, height, width = grid
        step = (np.cumsum(video) - 1) // (height * width // scheme.merge**2)
        frame = np.where(video | audio, scheme.temporal * step, -1)
    pieces = list(islice(heard, int(audio.sum()) // PIECE_TOKENS))
    if pieces and len(pieces) * PIECE_TOKENS == audio.sum():
        padding[audio] = ~np.concatenate(pieces).reshape(-1, TOKEN_ROWS).any(1)
    return of_places(video, audio, frame=frame, padding=padding)
