"""video-SALMONN 2 inside vLLM."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import BatchFeature
from vllm.multimodal import MULTIMODAL_REGISTRY  # pyright: ignore[reportMissingImports]

from fastav.adapter import Request
from fastav.engines.vllm.families._clips import ClipDummies, ClipInfo, ClipProcessing
from fastav.engines.vllm.families._model import ClipModel, Item
from fastav.models.video_salmonn2 import VideoSalmonn2Processor


class VideoSalmonn2Info(ClipInfo):
    """Its processor."""

    processor_class = VideoSalmonn2Processor


class VideoSalmonn2Processing(ClipProcessing):
    """Its clips: frames and sound in turns; the times after silent frames are text, padded with blanks."""

    def encoded(self, processor: Any, request: Request, place: str) -> BatchFeature:
        """See `ClipProcessing`."""
        return processor(place, **processor.media_arguments([processor.read(request)]))


@MULTIMODAL_REGISTRY.register_processor(VideoSalmonn2Processing, info=VideoSalmonn2Info, dummy_inputs=ClipDummies)
class VideoSalmonn2(ClipModel):
    """SigLIP, Whisper and a Q-Former in front of Qwen2."""

    def encode(self, item: Item) -> Mapping[int, Tensor]:
        """See `ClipModel`."""
        model: Any = self.encoders
        found = {}
        if "pixel_values_videos" in item:
            seen = model.get_video_features(item["pixel_values_videos"])
            found[self.config.video_token_id] = seen.pooler_output.flatten(0, 1)
        if "input_features" in item:
            heard = model.get_audio_features(item["input_features"], item["piece_index"])
            found[self.config.audio_token_id] = heard.pooler_output.flatten(0, 1)[item["audio_index"]]
        return found
