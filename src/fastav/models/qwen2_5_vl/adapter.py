"""The adapter of Qwen2.5-VL."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fastav.models._grids import Grids
from fastav.models._video_only import VideoOnlyAdapter

RELEASE = Grids(
    patch=14,
    merge=2,
    temporal=2,
    fps=2.0,
    min_frames=4,
    max_frames=768,
    min_pixels=128 * 28 * 28,
    max_pixels=768 * 28 * 28,
    video_tokens=128_000,
)


class Qwen25VLAdapter(VideoOnlyAdapter):
    """Qwen2.5-VL: video, no audio."""

    name = "qwen2-5-vl"
    architectures = frozenset({"Qwen2_5_VLForConditionalGeneration"})
    checkpoint = "Qwen/Qwen2.5-VL-7B-Instruct"
    config_class = "Qwen2_5_VLConfig"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    processor_class = "Qwen2_5_VLProcessor"
    release: ClassVar[Mapping[str, Any]] = {
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128_000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "tokens_per_second": 2},
    }
    fps = 2.0  # of the authors' preprocessing
    prefix = 15  # the system message, and the starts of the user's message and of the vision block
    temporal = 2

    def release_grid(self, seconds: float | int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens of a video of this length and size in the released model, along time, height and width."""
        return RELEASE.grid(seconds, height, width)
