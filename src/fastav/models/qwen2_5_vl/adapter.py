"""What the rest of fastav must know about Qwen2.5-VL."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fastav.models._grids import Grids
from fastav.models._sight import SightAdapter

RELEASED = Grids(
    patch=14,
    merge=2,
    temporal=2,
    fps=2.0,
    least=4,
    most=768,
    min_pixels=128 * 28 * 28,
    max_pixels=768 * 28 * 28,
    video_tokens=128_000,
)


class Qwen25VLAdapter(SightAdapter):
    """Qwen2.5-VL: it sees and does not hear."""

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
    fps = 2.0  # of the authors' own preparation
    prefix = 15  # the system message, the start of the user's, and of the vision block
    temporal = 2

    def released_grid(self, seconds: float | int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along time, height and width that the release makes of a video of this length and size."""
        return RELEASED.grid(seconds, height, width)
