"""The adapter of Qwen3-Omni."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedConfig

from fastav.budgets import Share
from fastav.flops import DecoderShape
from fastav.models._adapters import sparse_shape
from fastav.models._grids import Grids
from fastav.models._omni import FPS, KEEP_SHARE, MEL_FRAMES, OmniAdapter
from fastav.plan import Keep, Plan
from fastav.presets import fastav, plus, trim

STRIDE = 8  # columns of the spectrogram per audio token; every second starts a new token


class Qwen3OmniAdapter(OmniAdapter):
    """The thinker of Qwen3-Omni, a mixture of experts: video and audio tokens in order of time.

    The paper has no settings for this model. Video and audio alternate by time, as in video-SALMONN 2, so the preset
    `fastav` keeps what the paper keeps there: the first 40 % of the clip.
    """

    name = "qwen3-omni"
    architectures = frozenset({"Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration"})
    checkpoint = "Qwen/Qwen3-Omni-30B-A3B-Instruct"
    presets: ClassVar[Mapping[str, Plan]] = {
        "fastav": fastav(Keep(clip=Share(KEEP_SHARE))),
        "fastav-plus": plus(),
        "fastav-trim": trim(),
    }
    config_class = "Qwen3OmniMoeThinkerConfig"
    full_config_class = "Qwen3OmniMoeConfig"
    model_class = "Qwen3OmniMoeThinkerForConditionalGeneration"
    processor_class = "Qwen3OmniMoeProcessor"
    release: ClassVar[Mapping[str, Any]] = {
        "text_config": {
            "vocab_size": 152_064,
            "hidden_size": 2048,
            "intermediate_size": 768,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 65_536,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {"out_hidden_size": 2048},
        "audio_config": {"output_dim": 2048},
        "audio_token_id": 151_675,
        "audio_start_token_id": 151_669,
        "audio_end_token_id": 151_670,
        "vision_start_token_id": 151_652,
        "vision_end_token_id": 151_653,
        "position_id_per_seconds": 13,
        "seconds_per_chunk": 2,
    }
    grids = Grids(
        patch=16,
        merge=2,
        temporal=2,
        fps=FPS,
        min_frames=4,
        max_frames=768,
        min_pixels=128 * 32 * 32,
        max_pixels=768 * 32 * 32,
        video_tokens=128_000,
    )
    positions_per_second = 13
    pooled = False
    prefix = 5  # the starts of the user's message and of the vision and audio blocks

    def n_audio_tokens(self, columns: int) -> int:
        """Number of audio tokens of a spectrogram: 13 per 100 columns, and one per started 8 of the rest."""
        return columns // MEL_FRAMES * self.positions_per_second + -(-(columns % MEL_FRAMES) // STRIDE)

    def audio_starts(self, tokens: int) -> Float[np.ndarray, " tokens"]:
        """Start of each of a clip's audio tokens, in seconds: every 80 ms from the start of each second."""
        number = np.arange(tokens)
        return number // self.positions_per_second + number % self.positions_per_second * STRIDE / MEL_FRAMES

    def sort_key(self, position: Float[np.ndarray, " tokens"]) -> Float[np.ndarray, " tokens"]:
        """The positions themselves."""
        return position

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the Qwen3 decoder; the MLP is the experts that are active per token."""
        return sparse_shape(config)
