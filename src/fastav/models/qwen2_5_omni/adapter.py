"""The adapter of Qwen2.5-Omni."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedConfig

from fastav.budgets import Share
from fastav.flops import DecoderShape
from fastav.models._adapters import qwen2_shape
from fastav.models._grids import Grids
from fastav.models._omni import FPS, KEEP_SHARE, OmniAdapter
from fastav.plan import Keep, Plan
from fastav.presets import fastav, plus, trim

CHUNK_SECONDS = 2  # of video, then of its audio, then the next chunk


class Qwen25OmniAdapter(OmniAdapter):
    """The thinker of Qwen2.5-Omni: 2 s of video, the audio of these 2 s, the next 2 s, and so on.

    The paper has no settings for this model. Video and audio alternate by time, as in video-SALMONN 2, so the preset
    `fastav` keeps what the paper keeps there: the first 40 % of the clip.
    """

    name = "qwen2-5-omni"
    architectures = frozenset(
        {"Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniThinkerForConditionalGeneration"}
    )
    checkpoint = "Qwen/Qwen2.5-Omni-7B"
    presets: ClassVar[Mapping[str, Plan]] = {
        "fastav": fastav(Keep(clip=Share(KEEP_SHARE))),
        "fastav-plus": plus(),
        "fastav-trim": trim(),
    }
    config_class = "Qwen2_5OmniThinkerConfig"
    full_config_class = "Qwen2_5OmniConfig"
    model_class = "Qwen2_5OmniThinkerForConditionalGeneration"
    processor_class = "Qwen2_5OmniProcessor"
    release: ClassVar[Mapping[str, Any]] = {
        "text_config": {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": False,
        },
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
        "vision_start_token_id": 151_652,
        "vision_end_token_id": 151_653,
    }
    grids = Grids(
        patch=14,
        merge=2,
        temporal=2,
        fps=FPS,
        min_frames=4,
        max_frames=768,
        min_pixels=128 * 28 * 28,
        max_pixels=768 * 28 * 28,
        video_tokens=128_000,
    )
    positions_per_second = 25
    pooled = True
    prefix = 16  # the system message, and the starts of the user's message and of the vision and audio blocks

    def n_audio_tokens(self, columns: int) -> int:
        """Number of audio tokens of a spectrogram with this many columns, which the encoder halves twice."""
        return ((columns - 1) // 2 + 1 - 2) // 2 + 1

    def audio_starts(self, tokens: int) -> Float[np.ndarray, " tokens"]:
        """Start of each of a clip's audio tokens, in seconds: 25 tokens per second."""
        return np.arange(tokens) / self.positions_per_second

    def sort_key(self, position: Float[np.ndarray, " tokens"]) -> Float[np.ndarray, " tokens"]:
        """The number of the 2 s chunk of each of a clip's tokens."""
        return position // (CHUNK_SECONDS * self.positions_per_second)

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the Qwen2.5 decoder."""
        return qwen2_shape(config)
