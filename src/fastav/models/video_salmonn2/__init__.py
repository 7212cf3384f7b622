"""video-SALMONN 2 (7B). Importing this package registers it with transformers' Auto classes."""

from fastav.models._native import register
from fastav.models._pixels import pixel_values
from fastav.models._whisper import spectrograms
from fastav.models.video_salmonn2.adapter import VideoSalmonn2Adapter
from fastav.models.video_salmonn2.configuration import QFormerShape, VideoSalmonn2Config
from fastav.models.video_salmonn2.modeling import VideoSalmonn2ForConditionalGeneration, VideoSalmonn2Model
from fastav.models.video_salmonn2.processing import VideoSalmonn2Processor
from fastav.models.video_salmonn2.reading import left_channel, sample_frames
from fastav.models.video_salmonn2.scheme import Scheme

register(VideoSalmonn2Config, VideoSalmonn2Model, VideoSalmonn2ForConditionalGeneration, VideoSalmonn2Processor)

__all__ = [
    "QFormerShape",
    "Scheme",
    "VideoSalmonn2Adapter",
    "VideoSalmonn2Config",
    "VideoSalmonn2ForConditionalGeneration",
    "VideoSalmonn2Model",
    "VideoSalmonn2Processor",
    "left_channel",
    "pixel_values",
    "sample_frames",
    "spectrograms",
]
