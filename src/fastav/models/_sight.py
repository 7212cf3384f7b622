"""Families that take video and no audio: a clip is its frames, sampled and scaled by the family's own processor."""

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
from fastav.models._grids import Places, grid_layouts, timed
from fastav.models._official import (
    CHANNELS_LAST,
    OfficialAdapter,
    Row,
    Sampled,
    bounded,
    for_vllm,
    no_audio,
    refuse_written_placeholders,
    rendered,
    sampled,
)
from fastav.plan import Keep, Plan, Share

EXAMPLE_SECONDS = 30.0
KEPT = 0.4


class SightAdapter(OfficialAdapter):
    """A family that takes video and no audio.

    The paper has no settings for such models; the preset `fastav` keeps the share of the clip that the paper keeps of
    video-SALMONN 2, the first 40 % of its tokens, which follow its time.

    fps: frames a second where the processor names no rate. prefix: tokens of a typical prompt before the clip.
    temporal: frames that a token of the release shows.
    """

    supports_audio = False
    presets: ClassVar[Mapping[str, Plan]] = preset_plans(Keep(clip=Share(KEPT)))
    fps: ClassVar[float]
    prefix: ClassVar[int]
    temporal: ClassVar[int]

    @abstractmethod
    def released_grid(self, seconds: float | int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along time, height and width that the release makes of a video of this length and size."""

    def row(self, processor: Any, request: Request) -> Row:
        """The processor's tensors for one request, and its layout."""
        shown = self._shown(processor, request)
        video_processor = processor.video_processor
        inputs = processor(
            text=[shown.text],
            videos=[_enough(shown.video.frames, video_processor.temporal_patch_size)],
            video_metadata=[shown.video.metadata],
            do_sample_frames=False,
            input_data_format=CHANNELS_LAST,
            return_tensors="pt",
            **bounded(video_processor),
        )
        ids = (processor.video_token_id, processor.image_token_id)
        places = Places(
            video=ids[0], image=ids[1], merge=video_processor.merge_size, temporal=video_processor.temporal_patch_size
        )
        (layout,) = self.read(places, inputs)
        return Row(dict(inputs), timed(layout, frames=shown.video.seconds))

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """What vLLM is given for a request: one video."""
        self.require(processor, [request])
        known: Any = processor
        shown, video_processor = self._shown(known, request), known.video_processor
        frames = _enough(shown.video.frames, video_processor.temporal_patch_size)
        options = {"do_sample_frames": False, "input_data_format": CHANNELS_LAST, **bounded(video_processor)}
        return VllmInputs(text=shown.text, media={"video": (frames, for_vllm(shown.video))}, options=options)

    def _shown(self, processor: Any, request: Request) -> "_Shown":
        """A request, decoded and sampled."""
        refuse_written_placeholders(request.question, [processor.video_token, processor.image_token])
        return _Shown(
            text=rendered(processor, [{"type": "video"}, {"type": "text", "text": request.question}]),
            video=sampled(request.clip.require_video(), processor.video_processor, fps=self.fps),
        )

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        known: Any = config
        merge = getattr(known.vision_config, "spatial_merge_size", 1)
        temporal = getattr(known.vision_config, "temporal_patch_size", 1)
        places = Places(video=known.video_token_id, image=known.image_token_id, merge=merge, temporal=temporal)
        return self.read(places, inputs)

    def read(self, places: Places, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, given which ids stand for media."""
        return grid_layouts(places, inputs)

    def example(
        self,
        config: PreTrainedConfig,
        *,
        seconds: float | int | None = None,
        audio: int | None = None,
        video: int | None = None,
        text: int,
    ) -> Layout:
        """A typical prompt: some text, a clip of 30 s at 1280 x 720 in one piece, the rest of the text."""
        if audio:
            raise no_audio(self)
        time, height, width = self.released_grid(EXAMPLE_SECONDS if seconds is None else seconds, 720, 1280)
        tokens = time * height * width if video is None else video
        frame = np.arange(tokens) // (height * width) * self.temporal
        before = min(self.prefix, text)
        return Layout.join(
            [
                Layout.of(Modality.TEXT, before),
                Layout.of(Modality.VIDEO, tokens, frame=frame),
                Layout.of(Modality.TEXT, text - before),
            ]
        )

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the text model."""
        return qwen2_shape(config)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text model."""
        return model.get_submodule("model.language_model")

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The vision tower with its merger."""
        return (model.get_submodule("model.visual"),)


class _Shown(NamedTuple):
    """One request, decoded and sampled.  text: the conversation, with the mark of its video."""

    text: str
    video: Sampled


def _enough(frames: UInt8[np.ndarray, "frames h w 3"], temporal: int) -> UInt8[np.ndarray, "enough h w 3"]:
    # processors repeat the last frame of odd numbers, but some refuse fewer than a token shows
    missing = max(0, temporal - len(frames))
    return np.pad(frames, ((0, missing), (0, 0), (0, 0), (0, 0)), mode="edge") if missing else frames
