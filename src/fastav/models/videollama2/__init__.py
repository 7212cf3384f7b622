"""VideoLLaMA2.1-7B-AV. Importing this package registers it with transformers' Auto classes."""

from fastav.models._native import register
from fastav.models.videollama2.adapter import VideoLlama2Adapter
from fastav.models.videollama2.audio import clip_bounds, fbank, file_features, soundtrack_features
from fastav.models.videollama2.configuration import BeatsShape, VideoLlama2Config
from fastav.models.videollama2.modeling import VideoLlama2ForConditionalGeneration, VideoLlama2Model
from fastav.models.videollama2.processing import VideoLlama2Processor
from fastav.models.videollama2.scheme import Scheme
from fastav.models.videollama2.video import pixel_values, sample_frames

register(VideoLlama2Config, VideoLlama2Model, VideoLlama2ForConditionalGeneration, VideoLlama2Processor)

__all__ = [
    "BeatsShape",
    "Scheme",
    "VideoLlama2Adapter",
    "VideoLlama2Config",
    "VideoLlama2ForConditionalGeneration",
    "VideoLlama2Model",
    "VideoLlama2Processor",
    "clip_bounds",
    "fbank",
    "file_features",
    "pixel_values",
    "sample_frames",
    "soundtrack_features",
]
