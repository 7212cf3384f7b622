"""video-SALMONN 2+. Importing this package registers it with transformers' Auto classes."""

from fastav.models._native import register
from fastav.models._whisper import spectrograms
from fastav.models.video_salmonn2_plus.adapter import VideoSalmonn2PlusAdapter
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

register(
    VideoSalmonn2PlusConfig,
    VideoSalmonn2PlusModel,
    VideoSalmonn2PlusForConditionalGeneration,
    VideoSalmonn2PlusProcessor,
)

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
