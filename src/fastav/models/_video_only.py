"""The base of families that take video and no audio; the family's processor samples and resizes the frames."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import UInt8
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import Request, VllmInputs
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.models._adapters import preset_plans, qwen2_shape
from fastav.models._grids import MediaTokens, grid_layouts, with_frame_seconds
from fastav.models._official import (
    CHANNELS_LAST,
    OfficialAdapter,
    PreparedRequest,
    SampledVideo,
    no_audio,
    pixel_cap,
    refuse_placeholders,
    render_chat,
    sample_video,
    vllm_metadata,
)
from fastav.plan import Keep, Plan, Share

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

    def prepare_request(self, processor: Any, request: Request) -> PreparedRequest:
        """The processor's tensors for one request, and its layout."""
        sample = self._sample(processor, request)
        video_processor = processor.video_processor
        inputs = processor(
            text=[sample.text],
            videos=[_pad_frames(sample.video.frames, video_processor.temporal_patch_size)],
            video_metadata=[sample.video.metadata],
            do_sample_frames=False,
            input_data_format=CHANNELS_LAST,
            return_tensors="pt",
            **pixel_cap(video_processor),
        )
        ids = (processor.video_token_id, processor.image_token_id)
        media_tokens = MediaTokens(
            video=ids[0], image=ids[1], merge=video_processor.merge_size, temporal=video_processor.temporal_patch_size
        )
        (layout,) = self.read_layouts(media_tokens, inputs)
        return PreparedRequest(dict(inputs), with_frame_seconds(layout, frames=sample.video.seconds))

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """A request as vLLM takes it: one video."""
        self.check_requests(processor, [request])
        family_processor: Any = processor
        sample, video_processor = self._sample(family_processor, request), family_processor.video_processor
        frames = _pad_frames(sample.video.frames, video_processor.temporal_patch_size)
        options = {"do_sample_frames": False, "input_data_format": CHANNELS_LAST, **pixel_cap(video_processor)}
        return VllmInputs(text=sample.text, media={"video": (frames, vllm_metadata(sample.video))}, options=options)

    def _sample(self, processor: Any, request: Request) -> "_SampledRequest":
        """Decode and sample a request."""
        refuse_placeholders(request.question, [processor.video_token, processor.image_token])
        return _SampledRequest(
            text=render_chat(processor, [{"type": "video"}, {"type": "text", "text": request.question}]),
            video=sample_video(request.clip.require_video(), processor.video_processor, fps=self.fps),
        )

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        settings: Any = config
        merge = getattr(settings.vision_config, "spatial_merge_size", 1)
        temporal = getattr(settings.vision_config, "temporal_patch_size", 1)
        media_tokens = MediaTokens(
            video=settings.video_token_id, image=settings.image_token_id, merge=merge, temporal=temporal
        )
        return self.read_layouts(media_tokens, inputs)

    def read_layouts(self, media_tokens: MediaTokens, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the ids of media tokens."""
        return grid_layouts(media_tokens, inputs)

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


class _SampledRequest(NamedTuple):
    """One request, decoded and sampled.  text: the conversation, with a placeholder for the video."""

    text: str
    video: SampledVideo


def _pad_frames(frames: UInt8[np.ndarray, "frames h w 3"], temporal: int) -> UInt8[np.ndarray, "padded h w 3"]:
    # some processors reject fewer frames than one token covers; repeat the last one, as all do for an odd number
    missing = max(0, temporal - len(frames))
    return np.pad(frames, ((0, missing), (0, 0), (0, 0), (0, 0)), mode="edge") if missing else frames
