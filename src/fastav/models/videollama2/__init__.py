"""VideoLLaMA2.1-7B-AV. Importing this package registers it with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from fastav.models.videollama2.adapter import VideoLlama2Adapter
from fastav.models.videollama2.audio import clip_bounds, fbank, file_features, soundtrack_features
from fastav.models.videollama2.configuration import BeatsShape, VideoLlama2Config
from fastav.models.videollama2.modeling import VideoLlama2ForConditionalGeneration, VideoLlama2Model
from fastav.models.videollama2.processing import VideoLlama2Processor
from fastav.models.videollama2.scheme import Scheme
from fastav.models.videollama2.video import pixel_values, sample_frames

AutoConfig.register(VideoLlama2Config.model_type, VideoLlama2Config, exist_ok=True)
AutoModel.register(VideoLlama2Config, VideoLlama2Model, exist_ok=True)
AutoModelForImageTextToText.register(VideoLlama2Config, VideoLlama2ForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(VideoLlama2Config, VideoLlama2ForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VideoLlama2Config, VideoLlama2Processor, exist_ok=True)

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
