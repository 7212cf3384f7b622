"""The adapter of Qwen3-VL."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

from fastav.flops import DecoderShape
from fastav.models._adapters import qwen2_shape, sparse_shape
from fastav.models._video_only import VideoOnlyAdapter

# settings of the released video processor
FRAMES = (4, 768)  # minimum and maximum
SIDE, TEMPORAL = 32, 2  # pixels per side and frames per token
PIXELS = (4_096, 25_165_824)  # minimum and maximum of all frames together
FRAME_PIXELS = 768 * SIDE**2  # maximum of one frame


class Qwen3VLAdapter(VideoOnlyAdapter):
    """Qwen3-VL, dense and sparse: video, no audio.

    Prompts contain the time of every two frames as text before their tokens; it is text in layouts, too.
    """

    name = "qwen3-vl"
    architectures = frozenset({"Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"})
    checkpoint = "Qwen/Qwen3-VL-8B-Instruct"
    config_class = "Qwen3VLConfig"
    model_class = "Qwen3VLForConditionalGeneration"
    processor_class = "Qwen3VLProcessor"
    variants: ClassVar[Mapping[str, tuple[str, str]]] = {
        "qwen3_vl_moe": ("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration")
    }
    release: ClassVar[Mapping[str, Any]] = {
        "text_config": {
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {"out_hidden_size": 4096},
    }

    fps = 2.0
    prefix = 3  # the start of the user's message
    temporal = TEMPORAL

    def release_grid(self, seconds: float | int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens of a video of this length and size in the released model, along time, height and width."""
        available, (min_frames, max_frames) = round(seconds * 25), FRAMES
        frames = max(TEMPORAL, min(max(int(available / 25 * self.fps), min_frames), max_frames, available))
        pixels = frames * min(FRAME_PIXELS, PIXELS[1] // frames)
        height, width = smart_resize(frames, height, width, TEMPORAL, SIDE, PIXELS[0], pixels)
        return -(-frames // TEMPORAL), height // SIDE, width // SIDE

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the Qwen3 decoder; if it is sparse, the MLP is the experts that are active per token."""
        text: Any = config.get_text_config(decoder=True)
        return sparse_shape(config) if getattr(text, "num_experts_per_tok", None) else qwen2_shape(config)
