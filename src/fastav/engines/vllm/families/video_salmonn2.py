"""video-SALMONN 2 inside vLLM."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import BatchFeature
from vllm.multimodal import MULTIMODAL_REGISTRY  # pyright: ignore[reportMissingImports]

from fastav.adapter import Request
from fastav.engines.vllm.families._clips import RUN, ClipDummies, ClipInfo, ClipProcessing
from fastav.engines.vllm.families._model import ClipModel, Item
from fastav.models.video_salmonn2 import VideoSalmonn2Processor
from fastav.models.video_salmonn2.adapter import read_clip


class VideoSalmonn2Info(ClipInfo):
    """Its processor."""

    processor_class = VideoSalmonn2Processor


class VideoSalmonn2Processing(ClipProcessing):
    """Its clips: frames and sound in turns; the times after silent frames are text, padded with blanks."""

    def encoded(self, processor: Any, request: Request, place: str) -> BatchFeature:
        """See `ClipProcessing`."""
        clip = read_clip(request, processor.media)
        return processor(place, videos=[clip["video"]], audio=[clip["audio"]], video_seconds=[clip["seconds"]])

    def media_ids(self) -> list[int]:
        """See `ClipProcessing`."""
        media = self.info.get_hf_processor().media
        return [media.video_token_id, media.audio_token_id, media.blank_token_id]


@MULTIMODAL_REGISTRY.register_processor(VideoSalmonn2Processing, info=VideoSalmonn2Info, dummy_inputs=ClipDummies)
class VideoSalmonn2(ClipModel):
    """SigLIP, Whisper and a Q-Former in front of Qwen2."""

    def encode(self, item: Item) -> Mapping[int, Tensor]:
        """See `ClipModel`."""
        model: Any = self.encoders
        found, blanks = {}, item[RUN] == self.config.blank_token_id
        if "pixel_values_videos" in item:
            found[self.config.video_token_id] = model.get_video_features(item["pixel_values_videos"]).flatten(0, 1)
        if "input_features" in item:
            tokens = model.get_audio_features(item["input_features"], item["piece_index"]).flatten(0, 1)
            found[self.config.audio_token_id] = tokens[item["audio_index"]]
        width = next(iter(found.values()))
        return found | {self.config.blank_token_id: width.new_zeros(len(blanks), width.shape[1])}
