"""video-SALMONN 2+. Importing this package registers it with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from fastav.models.video_salmonn2_plus.adapter import VideoSalmonn2PlusAdapter
from fastav.models.video_salmonn2_plus.audio import spectrograms
from fastav.models.video_salmonn2_plus.configuration import (
    QFormerShape,
    VideoSalmonn2PlusAudioConfig,
    VideoSalmonn2PlusConfig,
)
from fastav.models.video_salmonn2_plus.modeling import (
    VideoSalmonn2PlusForConditionalGeneration,
    VideoSalmonn2PlusModel,
)
from fastav.models.video_salmonn2_plus.positions import row_positions
from fastav.models.video_salmonn2_plus.processing import VideoSalmonn2PlusProcessor
from fastav.models.video_salmonn2_plus.scheme import Scheme, audio_per_step, audio_tokens
from fastav.models.video_salmonn2_plus.video import patches, sample_frames

AutoConfig.register(VideoSalmonn2PlusConfig.model_type, VideoSalmonn2PlusConfig, exist_ok=True)
AutoModel.register(VideoSalmonn2PlusConfig, VideoSalmonn2PlusModel, exist_ok=True)
AutoModelForImageTextToText.register(VideoSalmonn2PlusConfig, VideoSalmonn2PlusForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(VideoSalmonn2PlusConfig, VideoSalmonn2PlusForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VideoSalmonn2PlusConfig, VideoSalmonn2PlusProcessor, exist_ok=True)

__all__ = [
    "QFormerShape",
    "Scheme",
    "VideoSalmonn2PlusAdapter",
    "VideoSalmonn2PlusAudioConfig",
    "VideoSalmonn2PlusConfig",
    "VideoSalmonn2PlusForConditionalGeneration",
    "VideoSalmonn2PlusModel",
    "VideoSalmonn2PlusProcessor",
    "audio_per_step",
    "audio_tokens",
    "patches",
    "row_positions",
    "sample_frames",
    "spectrograms",
]
