"""What the rest of fastav must know about video-SALMONN 2."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import max_pool2d, pad
from transformers import PreTrainedConfig, ProcessorMixin

from fastav.adapter import EncoderAttention, EncoderCall, VllmInputs
from fastav.budgets import Frames
from fastav.layout import Layout, Modality
from fastav.models._adapters import preset_plans, to_numpy
from fastav.models._boxes import Boxes, grid_boxes, with_line_ends
from fastav.models._native import NativeAdapter
from fastav.models._native_processing import shown_whole
from fastav.models._siglip_attention import SiglipAttention
from fastav.models._whisper import COLUMNS, HOP, PIECE_SECONDS, RATE, pieces
from fastav.models.video_salmonn2.configuration import VideoSalmonn2Config
from fastav.models.video_salmonn2.modeling import VideoSalmonn2ForConditionalGeneration
from fastav.models.video_salmonn2.processing import VideoSalmonn2Processor
from fastav.models.video_salmonn2.reading import sample_frames
from fastav.models.video_salmonn2.scheme import Scheme
from fastav.plan import Keep, Plan
from fastav.request import Request

EXAMPLE_SECONDS = 10  # of the clips in AVHBench and AVQA, on which the paper measures
EXAMPLE_FPS = 25


class VideoSalmonn2Adapter(NativeAdapter):
    """video-SALMONN 2, 7B.

    Frames and sound are interleaved: a frame's patches and newlines are video, the audio tokens after it have its
    index. The times that follow the frames of silent videos are text, their padding included.
    """

    name = "video-salmonn2"
    original = "VideoSALMONN2ForCausalLM"
    architectures = frozenset({original, "VideoSalmonn2ForConditionalGeneration"})
    checkpoint = "tsinghua-ee/video-SALMONN-2"
    config_class = VideoSalmonn2Config
    model_class = VideoSalmonn2ForConditionalGeneration
    processor_class = VideoSalmonn2Processor
    presets: ClassVar[Mapping[str, Plan]] = preset_plans(Keep(media=Frames(4)))
    prefix = 14  # the system message and the start of the user's
    encoder_names = (
        "model.vision_tower",
        "model.mm_projector",
        "speech_encoder",
        "ln_speech",
        "speech_Qformer",
        "speech_llama_proj",
        "final_linear",
    )

    def vision_attention(self) -> EncoderAttention:
        """SigLIP's attention, pooled as its patches are."""
        return PooledPatchesAttention(self)

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """What vLLM is given for a request: the clip as it is."""
        return shown_whole(processor, request)

    def step_boxes(self, scheme: Scheme, inputs: Mapping[str, Any]) -> Iterator[Boxes]:
        """A frame is one step. Newlines show nothing, and pixels and patches that fill no patch or token have none."""
        side, shown = scheme.side_tokens, scheme.side_tokens * scheme.pool_stride * scheme.patch_size
        share = shown / scheme.image_size
        return repeat(with_line_ends(grid_boxes(side, side, height=share, width=share), side))

    def silence(self, scheme: Scheme, inputs: Mapping[str, Any]) -> Bool[np.ndarray, "sounds tokens"]:
        """Of each audio placeholder of the batch by itself, since tokens may be repeated."""
        columns, index = inputs.get("feature_attention_mask"), inputs.get("audio_index")
        if columns is None:
            return np.zeros((0, 1), bool)
        silent = ~scheme.has_sound(to_numpy(columns).astype(bool))
        return (silent if index is None else silent[to_numpy(index)])[:, None]

    def starts(
        self, scheme: Scheme, inputs: Mapping[str, Any], clips: Sequence[Mapping[str, Any]], layouts: Sequence[Layout]
    ) -> Iterator[tuple[Any, Any]]:
        """Each frame when it is shown, each audio token when its window starts."""
        windows = np.zeros(0)
        if "piece_index" in inputs:
            starts = to_numpy(inputs["piece_index"])[:, None] * PIECE_SECONDS + scheme.piece_seconds()
            windows = starts.ravel()[to_numpy(inputs["audio_index"])]
        for layout, clip in zip(layouts, clips, strict=True):
            count = layout.count(Modality.AUDIO)
            yield clip["shown"][layout.frame[layout.modality == Modality.VIDEO]], clip["sound_start"] + windows[:count]
            windows = windows[count:]

    def example_clip(
        self, config: PreTrainedConfig, seconds: float | None, audio: int | None, video: int | None
    ) -> Layout:
        """A clip of 10 s with its sound: frames, each followed by its share of the audio tokens."""
        scheme: Scheme = self.scheme_of(config)
        seconds = EXAMPLE_SECONDS if seconds is None else seconds
        frames = len(sample_frames(max(1, round(seconds * EXAMPLE_FPS)), EXAMPLE_FPS, scheme))
        video = frames * scheme.frame_tokens if video is None else video
        padding = None
        if audio is None:
            count = pieces(seconds * RATE)
            each, rest = scheme.spread(count * scheme.piece_tokens, frames, seconds)
            is_sound = np.arange(count * COLUMNS) * HOP < seconds * RATE
            padding = ~scheme.has_sound(is_sound.reshape(count, COLUMNS))[np.concatenate([each.ravel(), rest])]
            audio = len(padding)
        frames = -(-video // scheme.frame_tokens)
        follows = np.arange(audio) * frames // max(1, audio) if frames else np.full(audio, -1)
        layout = Layout.join(
            [
                Layout.of(Modality.VIDEO, video, frame=np.arange(video) // scheme.frame_tokens),
                Layout.of(Modality.AUDIO, audio, frame=follows, padding=padding),
            ]
        )
        order = np.argsort(layout.frame, kind="stable")
        return Layout(**{name: getattr(layout, name)[order] for name in Layout.__slots__})


class PooledPatchesAttention(SiglipAttention):
    """The attention of SigLIP's last layer that runs: a token has the maximum of its square of patches, a newline 0.

    The model too takes the maximum of these patches, in each feature.
    """

    def pool(self, patches: Float[Tensor, "frames patches"], call: EncoderCall) -> Float[Tensor, "..."]:
        """[frames, rows, columns and the newline]; like the model without what is left of the last row and column."""
        config: Any = call.config
        side = math.isqrt(patches.shape[1])
        return pad(max_pool2d(patches.reshape(-1, side, side), config.mm_spatial_pool_stride), (0, 1))
