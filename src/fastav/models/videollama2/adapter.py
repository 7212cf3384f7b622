"""What the rest of fastav must know about VideoLLaMA2.1-7B-AV."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import EncoderAttention, EncoderCall, VllmInputs
from fastav.budgets import Tokens
from fastav.layout import Layout, Modality
from fastav.models._adapters import layout_from_masks, preset_plans, to_numpy
from fastav.models._boxes import Boxes, grid_boxes
from fastav.models._native import NativeAdapter, repeated
from fastav.models._native_processing import shown_whole
from fastav.models._siglip_attention import SiglipAttention
from fastav.models.videollama2.beats import Beats, BeatsAttention
from fastav.models.videollama2.configuration import VideoLlama2Config
from fastav.models.videollama2.modeling import VideoLlama2ForConditionalGeneration
from fastav.models.videollama2.processing import VideoLlama2Processor
from fastav.models.videollama2.scheme import MERGE, RATE, SHIFT, Scheme
from fastav.plan import Keep, Plan
from fastav.request import Request


class VideoLlama2Adapter(NativeAdapter):
    """VideoLLaMA2.1-7B-AV.

    Of a clip with video, the model takes the soundtrack in eight pieces (`clip_bounds`). Audio alone, of whatever file,
    is read as the original reads sound files: the first channel's first 30 s at its own rate (the original cannot open
    video files so).
    """

    name = "videollama2"
    original = "Videollama2Qwen2ForCausalLM"
    architectures = frozenset({original, "VideoLlama2ForConditionalGeneration"})
    checkpoint = "DAMO-NLP-SG/VideoLLaMA2.1-7B-AV"
    config_class = VideoLlama2Config
    model_class = VideoLlama2ForConditionalGeneration
    processor_class = VideoLlama2Processor
    presets: ClassVar[Mapping[str, Plan]] = preset_plans(Keep(audio=Tokens(10)))
    prefix = 14  # the system message and the start of the user's
    encoder_names = ("vision_tower", "mm_projector", "audio_tower", "mm_projector_a")  # of the decoder

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """What vLLM is given for a request: the clip as it is."""
        return shown_whole(processor, request)

    def interleaves(self, scheme: Scheme) -> bool:
        """Whether the sound is spread over the pairs of frames."""
        return scheme.interleaved

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """SigLIP, the STC connector, BEATs and the audio projector, which are inside the decoder."""
        return super().encoders(model.get_decoder())

    def audio_attention(self) -> EncoderAttention:
        """BEATs' attention; each of its tokens is one of the prompt's."""
        return BeatsLastAttention()

    def vision_attention(self) -> EncoderAttention:
        """SigLIP's attention, pooled over the patches that the connector merges."""
        return MergedPatchesAttention(self)

    def step_boxes(self, scheme: Scheme, inputs: Mapping[str, Any]) -> Iterator[Boxes]:
        """Two merged frames are one step. Pixels and patches that fill no patch or token have none."""
        side, shown = scheme.side_tokens, scheme.side_tokens * MERGE * scheme.patch_size / scheme.image_size
        return repeat(grid_boxes(side, side, height=shown, width=shown))

    def silence(self, scheme: Scheme, inputs: Mapping[str, Any]) -> Bool[np.ndarray, "sounds tokens"]:
        """A token is padding if no row of its patch holds sound."""
        mask = inputs.get("feature_attention_mask")
        return _silence(scheme, np.zeros((0, scheme.fbank_rows), bool) if mask is None else to_numpy(mask).astype(bool))

    def starts(
        self, scheme: Scheme, inputs: Mapping[str, Any], clips: Sequence[Mapping[str, Any]], layouts: Sequence[Layout]
    ) -> Iterator[tuple[Any, Any]]:
        """Each pair of frames starts with its first; the patches of a time start together."""
        for layout, clip in zip(layouts, clips, strict=True):
            yield (
                repeated(clip["frame_seconds"], layout.count(Modality.VIDEO)),
                repeated(clip["sound_seconds"], layout.count(Modality.AUDIO)),
            )

    def example_clip(
        self, config: PreTrainedConfig, seconds: float | None, audio: int | None, video: int | None
    ) -> Layout:
        """A clip of any length gives as many tokens; of its audio, 16 s are sound."""
        scheme: Scheme = self.scheme_of(config)
        is_sound = np.arange(scheme.fbank_rows) < scheme.audio_clips * scheme.clip_seconds * RATE // SHIFT
        tokens = scheme.video_tokens(min(scheme.num_frames, scheme.most_frames)) if video is None else video
        sounds = scheme.audio_tokens if audio is None else audio
        order = scheme.order(tokens, sounds)
        shown = order < tokens
        padding = np.zeros(len(order), bool)
        if audio is None:
            padding[~shown] = _silence(scheme, is_sound[None])[0]
        pair = (np.cumsum(shown) - 1) // scheme.pair_tokens
        frame = np.where((shown | scheme.interleaved) & (pair >= 0), pair * MERGE, -1)
        return layout_from_masks(shown, ~shown, frame=frame, padding=padding)


class BeatsLastAttention(EncoderAttention):
    """The attention of BEATs' last layer: every token of a sound, padding included, attends to all."""

    modalities = (Modality.AUDIO,)

    def modules(self, model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
        """BEATs, and the attention of its last layer."""
        tower = model.get_decoder().get_submodule("audio_tower")
        assert isinstance(tower, Beats)
        return tower, tower.encoder.layers[-1].get_submodule("self_attn")

    def scores(
        self, attention: nn.Module, call: EncoderCall, attention_inputs: Mapping[str, Any]
    ) -> Float[Tensor, " tokens"]:
        """Of each audio token: the mean over heads and over all tokens of its sound."""
        assert isinstance(attention, BeatsAttention)
        return attention.received_attention(attention_inputs["hidden"], attention_inputs["position_bias"]).flatten()


class MergedPatchesAttention(SiglipAttention):
    """The attention of SigLIP's last layer that runs, which is the second to last in the release.

    A token has the mean of the eight patches that the connector's strided convolution merges: two rows and two columns
    of two frames. Its other convolutions see neighbours of these, and its gates the whole frame; that is left out.
    """

    def pool(self, patches: Float[Tensor, "frames patches"], call: EncoderCall) -> Float[Tensor, "..."]:
        """[videos, pairs, rows, columns]; like the connector without a last odd frame, row and column."""
        videos, side = len(call.model_inputs["pixel_values_videos"]), math.isqrt(patches.shape[1])
        return avg_pool3d(patches.unflatten(1, (side, side)).unflatten(0, (videos, -1)), MERGE)


def _silence(scheme: Scheme, is_sound: Bool[np.ndarray, "sounds rows"]) -> Bool[np.ndarray, "sounds tokens"]:
    """Which tokens of each sound are padding.  is_sound: whether a row of the filter bank holds sound."""
    times, frequencies = scheme.audio_grid
    rows = is_sound[:, : times * scheme.audio_patch].reshape(len(is_sound), times, scheme.audio_patch)
    return ~np.repeat(rows.any(2), frequencies, axis=1)
