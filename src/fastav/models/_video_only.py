"""The base of families that take video and no audio; the family's processor samples and resizes the frames."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import EncoderAttention, Transcript, VllmInputs
from fastav.budgets import Share
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.messages import Kind, Media
from fastav.models._adapters import preset_plans, qwen2_shape
from fastav.models._grids import MediaTokens, grid_pieces
from fastav.models._official import (
    CHANNELS_LAST,
    OfficialAdapter,
    no_audio,
    pixel_cap,
    sample_video,
    vllm_media,
    vllm_metadata,
)
from fastav.models._patch_attention import PatchAttention
from fastav.models._pieces import Pieces, Sample
from fastav.plan import Keep, Plan
from fastav.request import Request

EXAMPLE_SECONDS = 30.0
KEEP_SHARE = 0.4  # of the clip's tokens


class VideoOnlyAdapter(OfficialAdapter):
    """The base class of families that take video and no audio.

    The paper has no settings for such models. The preset `fastav` keeps the share of the clip that the paper keeps for
    video-SALMONN 2: the first 40 % of its tokens, which are in order of time.

    fps: frames per second if the processor defines no rate. prefix: tokens of a typical prompt before the clip.
    temporal: frames per token of the released model.
    """

    supports_audio = False
    presets: ClassVar[Mapping[str, Plan]] = preset_plans(Keep(clip=Share(KEEP_SHARE)))
    fps: ClassVar[float]
    temporal: ClassVar[int]

    @abstractmethod
    def release_grid(self, seconds: float | int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens of a video of this length and size in the released model, along time, height and width."""

    def sample(self, processor: Any, media: Media) -> Sample:
        """A video, sampled as the processor's settings say, or an image."""
        if media.kind is Kind.IMAGE:
            return Sample(parts=[{"type": "image"}], images=[media.clip.require_video().read([0])[0]])
        video = sample_video(media.clip.require_video(), processor.video_processor, fps=self.fps)
        return Sample(parts=[{"type": "video"}], videos=[video], seconds=video.seconds)

    def process(self, processor: Any, text: str, samples: Sequence[Sample]) -> dict[str, Any]:
        """The processor's tensors for a rendered conversation and its media."""
        video_processor = processor.video_processor
        videos = [video for sample in samples for video in sample.videos]
        images = [image for sample in samples for image in sample.images]
        options: dict[str, Any] = {"images": images} if images else {}
        if videos:
            options["videos"] = [_pad_frames(video.frames, video_processor.temporal_patch_size) for video in videos]
            options["video_metadata"] = [video.metadata for video in videos]
            options |= {"do_sample_frames": False, **pixel_cap(video_processor)}
        if options:
            options["input_data_format"] = CHANNELS_LAST
        return dict(processor(text=[text], return_tensors="pt", **options))

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """A request as vLLM takes it: videos and images."""
        self.check_requests(processor, [request])
        family_processor: Any = processor
        samples = [self.sample(family_processor, media) for media in request.media]
        temporal = family_processor.video_processor.temporal_patch_size
        videos = [
            (_pad_frames(video.frames, temporal), vllm_metadata(video)) for sample in samples for video in sample.videos
        ]
        options = {
            "do_sample_frames": False,
            "input_data_format": CHANNELS_LAST,
            **pixel_cap(family_processor.video_processor),
        }
        return VllmInputs(
            text=self.transcript(family_processor, request, samples, Transcript())[1],
            media=vllm_media(video=videos, image=[image for sample in samples for image in sample.images]),
            options=options if videos else {},
        )

    def placeholders(self, processor: Any) -> Sequence[str]:
        """The words that stand for videos and images."""
        return [processor.video_token, processor.image_token]

    def media_tokens(self, processor: Any) -> MediaTokens:
        """The ids of media tokens, from the processor."""
        return MediaTokens(
            video=processor.video_token_id,
            image=processor.image_token_id,
            merge=processor.video_processor.merge_size,
            temporal=processor.video_processor.temporal_patch_size,
        )

    def config_tokens(self, config: Any) -> MediaTokens:
        """The ids of media tokens, from the model's configuration."""
        return MediaTokens(
            video=config.video_token_id,
            image=config.image_token_id,
            merge=getattr(config.vision_config, "spatial_merge_size", 1),
            temporal=getattr(config.vision_config, "temporal_patch_size", 1),
        )

    def pieces(self, media_tokens: MediaTokens, inputs: Mapping[str, Any]) -> Iterator[Pieces]:
        """The media tokens of each prompt of a batch, from the arguments of `forward` alone."""
        return grid_pieces(media_tokens, inputs, iter(()))

    def example_clip(
        self, config: PreTrainedConfig, seconds: float | None, audio: int | None, video: int | None
    ) -> Layout:
        """A 1280 x 720 clip (30 s unless `seconds` is set) in one block."""
        if audio:
            raise no_audio(self)
        time, height, width = self.release_grid(EXAMPLE_SECONDS if seconds is None else seconds, 720, 1280)
        tokens = time * height * width if video is None else video
        frame = np.arange(tokens) // (height * width) * self.temporal
        return Layout.of(Modality.VIDEO, tokens, frame=frame)

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the text model."""
        return qwen2_shape(config)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text model."""
        return model.get_submodule("model.language_model")

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The vision tower with its merger."""
        return (model.get_submodule("model.visual"),)

    def vision_attention(self) -> EncoderAttention:
        """The attention of the vision tower, within the frames of one token."""
        return PatchAttention(self)


def _pad_frames(frames: UInt8[np.ndarray, "frames h w 3"], temporal: int) -> UInt8[np.ndarray, "padded h w 3"]:
    # some processors reject fewer frames than one token covers; repeat the last one, as all do for an odd number
    missing = max(0, temporal - len(frames))
    return np.pad(frames, ((0, missing), (0, 0), (0, 0), (0, 0)), mode="edge") if missing else frames
