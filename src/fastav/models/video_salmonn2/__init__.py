"""video-SALMONN 2 (7B). Importing this package registers it with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from fastav.models._pixels import pixel_values
from fastav.models.video_salmonn2.adapter import VideoSalmonn2Adapter
from fastav.models.video_salmonn2.audio import left_channel, log_mel
from fastav.models.video_salmonn2.configuration import QFormerShape, VideoSalmonn2Config
from fastav.models.video_salmonn2.modeling import VideoSalmonn2ForConditionalGeneration, VideoSalmonn2Model
from fastav.models.video_salmonn2.processing import VideoSalmonn2Processor
from fastav.models.video_salmonn2.scheme import Scheme
from fastav.models.video_salmonn2.video import sample_frames

AutoConfig.register(VideoSalmonn2Config.model_type, VideoSalmonn2Config, exist_ok=True)
AutoModel.register(VideoSalmonn2Config, VideoSalmonn2Model, exist_ok=True)
AutoModelForImageTextToText.register(VideoSalmonn2Config, VideoSalmonn2ForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(VideoSalmonn2Config, VideoSalmonn2ForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VideoSalmonn2Config, VideoSalmonn2Processor, exist_ok=True)

__all__ = [
    "QFormerShape",
    "Scheme",
    "VideoSalmonn2Adapter",
    "VideoSalmonn2Config",
    "VideoSalmonn2ForConditionalGeneration",
    "VideoSalmonn2Model",
    "VideoSalmonn2Processor",
    "left_channel",
    "log_mel",
    "pixel_values",
    "sample_frames",
]
