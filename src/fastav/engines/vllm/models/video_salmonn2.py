"""video-SALMONN 2 inside vLLM."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import BatchFeature

from fastav.engines.vllm.compat import MULTIMODAL_REGISTRY
from fastav.engines.vllm.models._clips import ClipDummies, ClipInfo, ClipProcessing
from fastav.engines.vllm.models._model import ClipModel, Features
from fastav.messages import Media
from fastav.models.video_salmonn2 import VideoSalmonn2Processor


class VideoSalmonn2Info(ClipInfo):
    """Names the processor."""

    processor_class = VideoSalmonn2Processor


class VideoSalmonn2Processing(ClipProcessing):
    """Clips with frames and sound in turns; the times after silent frames are text, padded with blanks."""

    def encode(self, processor: Any, media: Media, placeholder: str) -> BatchFeature:
        """See `ClipProcessing`."""
        return processor(placeholder, **processor.media_arguments([processor.read(media)]))


@MULTIMODAL_REGISTRY.register_processor(VideoSalmonn2Processing, info=VideoSalmonn2Info, dummy_inputs=ClipDummies)
class VideoSalmonn2(ClipModel):
    """SigLIP, Whisper and a Q-Former in front of Qwen2."""

    def encode(self, features: Features) -> Mapping[int, Tensor]:
        """See `ClipModel`."""
        model: Any = self.encoders
        embeddings = {}
        if "pixel_values_videos" in features:
            video = model.get_video_features(features["pixel_values_videos"])
            embeddings[self.config.video_token_id] = video.pooler_output.flatten(0, 1)
        if "input_features" in features:
            audio = model.get_audio_features(features["input_features"], features["piece_index"])
            embeddings[self.config.audio_token_id] = audio.pooler_output.flatten(0, 1)[features["audio_index"]]
        return embeddings
