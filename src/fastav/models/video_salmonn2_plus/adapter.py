"""What the rest of fastav must know about video-SALMONN 2+."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool
from transformers import PreTrainedConfig

from fastav.adapter import EncoderAttention
from fastav.budgets import Share
from fastav.layout import Layout, Modality
from fastav.models._adapters import preset_plans, to_numpy
from fastav.models._boxes import Boxes, grid_boxes
from fastav.models._native import NativeAdapter, repeated
from fastav.models._patch_attention import PatchAttention
from fastav.models._whisper import COLUMNS, RATE
from fastav.models.video_salmonn2_plus.configuration import VideoSalmonn2PlusConfig
from fastav.models.video_salmonn2_plus.modeling import VideoSalmonn2PlusForConditionalGeneration
from fastav.models.video_salmonn2_plus.processing import VideoSalmonn2PlusProcessor
from fastav.models.video_salmonn2_plus.scheme import (
    PIECE_TOKENS,
    TOKEN_COLUMNS,
    TOKENS_PER_SECOND,
    Scheme,
    audio_per_step,
    audio_tokens,
)
from fastav.plan import Keep, Plan

EXAMPLE_SECONDS, EXAMPLE_SIZE = 40.0, (720, 1280)
KEPT = 0.4  # the share of the clip that the paper keeps of video-SALMONN 2: 4 of its 10 frames


class VideoSalmonn2PlusAdapter(NativeAdapter):
    """video-SALMONN 2+, the one that is built on Qwen2.5-VL.

    It takes a clip with video, with or without its sound; sound alone is refused, because how the original takes it is
    not known here. The paper has no settings for this model; the preset `fastav` keeps the share that it keeps of
    video-SALMONN 2, the first 40 % of the clip's tokens, which follow its time.
    """

    name = "video-salmonn2-plus"
    original = "video_SALMONN2_plus"
    architectures = frozenset({original, "VideoSalmonn2PlusForConditionalGeneration"})
    checkpoint = "tsinghua-ee/video-SALMONN-2_plus_7B"
    config_class = VideoSalmonn2PlusConfig
    model_class = VideoSalmonn2PlusForConditionalGeneration
    processor_class = VideoSalmonn2PlusProcessor
    presets: ClassVar[Mapping[str, Plan]] = preset_plans(Keep(media=Share(KEPT)))
    prefix = 15  # the system message, the start of the user's, and of the vision block
    encoder_names = ("visual", "audio")

    def vision_attention(self) -> EncoderAttention:
        """The attention of Qwen2.5-VL's tower, within two frames."""
        return PatchAttention(self)

    def step_boxes(self, scheme: Scheme, inputs: Mapping[str, Any]) -> Iterator[Boxes]:
        """Two frames are one step, whose size depends on the frames'."""
        sizes = inputs.get("video_grid_thw")
        for _, height, width in [] if sizes is None else to_numpy(sizes).tolist():
            yield grid_boxes(height // scheme.merge, width // scheme.merge)

    def silence(self, scheme: Scheme, inputs: Mapping[str, Any]) -> Bool[np.ndarray, "sounds tokens"]:
        """A token is padding if no column of its half second holds sound."""
        mask = inputs.get("feature_attention_mask")
        is_sound = np.zeros((0, COLUMNS), bool) if mask is None else to_numpy(mask).astype(bool)
        return np.logical_not(is_sound.reshape(-1, PIECE_TOKENS, TOKEN_COLUMNS).any(2))

    def starts(
        self, scheme: Scheme, inputs: Mapping[str, Any], clips: Sequence[Mapping[str, Any]], layouts: Sequence[Layout]
    ) -> Iterator[tuple[Any, Any]]:
        """Each step with its first frame, an audio token every half second."""
        for layout, clip in zip(layouts, clips, strict=True):
            sound = np.arange(layout.count(Modality.AUDIO)) / TOKENS_PER_SECOND
            yield repeated(clip["step_starts"], layout.count(Modality.VIDEO)), sound

    def example_clip(
        self, config: PreTrainedConfig, seconds: float | None, audio: int | None, video: int | None
    ) -> Layout:
        """A clip of 40 s at 1280 x 720 with its sound."""
        scheme: Scheme = self.scheme_of(config)
        seconds = EXAMPLE_SECONDS if seconds is None else seconds
        frames = scheme.frames(seconds)
        steps, height, width = scheme.grid(frames, *scheme.size(frames, *EXAMPLE_SIZE))
        tokens = steps * height * width if video is None else video
        sound = audio_tokens(int(seconds * RATE)) if audio is None else audio
        unpadded = seconds * TOKENS_PER_SECOND if audio is None else sound
        parts, n_audio, n_video = [], 0, 0
        used = max(1, -(-tokens // (height * width)))
        for step, count in enumerate(audio_per_step(used, scheme.step_seconds(frames, seconds), sound)):
            shown = min(height * width, tokens - n_video)
            frame = scheme.temporal * step if tokens else -1
            padding = np.arange(n_audio, n_audio + count) >= unpadded
            parts.append(Layout.of(Modality.VIDEO, shown, frame=np.full(shown, frame)))
            parts.append(Layout.of(Modality.AUDIO, count, frame=np.full(count, frame), padding=padding))
            n_audio, n_video = n_audio + count, n_video + shown
        return Layout.join(parts)
