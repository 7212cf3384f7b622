"""What the rest of fastav must know about Qwen2.5-VL."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastav.adapter import Request
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.models._adapters import qwen2_shape
from fastav.models._grids import Grids, Places, grid_layouts, timed
from fastav.models._official import OfficialAdapter, Row, bounded, deaf, refuse_written_placeholders, rendered, sampled
from fastav.plan import Keep, Plan, Share
from fastav.presets import fastav, trim

FPS = 2.0  # frames a second, by default, of the authors' own preparation
RELEASED = Grids(
    patch=14,
    merge=2,
    temporal=2,
    fps=FPS,
    least=4,
    most=768,
    min_pixels=128 * 28 * 28,
    max_pixels=768 * 28 * 28,
    video_tokens=128_000,
)
PREFIX = 15  # tokens before the clip: the system message, the start of the user's, and of the vision block
EXAMPLE_SECONDS = 30.0
KEPT = 0.4


class Qwen25VLAdapter(OfficialAdapter):
    """Qwen2.5-VL: it sees and does not hear.

    The paper has no settings for it; the preset `fastav` keeps the share of the clip that the paper keeps of
    video-SALMONN 2, the first 40 % of its tokens, which follow its time.
    """

    name = "qwen2-5-vl"
    architectures = frozenset({"Qwen2_5_VLForConditionalGeneration"})
    checkpoint = "Qwen/Qwen2.5-VL-7B-Instruct"
    presets: ClassVar[Mapping[str, Plan]] = {"fastav": fastav(Keep(media=Share(KEPT))), "fastav-trim": trim()}
    hears = False
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

    def row(self, processor: Any, request: Request) -> Row:
        """The processor's tensors for one request, and its layout."""
        refuse_written_placeholders(request.question, [processor.video_token, processor.image_token])
        clip = sampled(request.clip.require_video(), processor.video_processor, fps=FPS)
        inputs = processor(
            text=[rendered(processor, [{"type": "video"}, {"type": "text", "text": request.question}])],
            videos=[clip.frames],
            video_metadata=[clip.metadata],
            do_sample_frames=False,
            **bounded(processor.video_processor),
            return_tensors="pt",
        )
        places = Places(
            video=processor.video_token_id,
            image=processor.image_token_id,
            merge=processor.video_processor.merge_size,
            temporal=processor.video_processor.temporal_patch_size,
        )
        (layout,) = grid_layouts(places, inputs)
        return Row(dict(inputs), timed(layout, frames=clip.seconds))

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        known: Any = config
        vision = known.vision_config
        places = Places(
            video=known.video_token_id,
            image=known.image_token_id,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
        )
        return grid_layouts(places, inputs)

    def example(
        self,
        config: PreTrainedConfig,
        *,
        seconds: float | int | None = None,
        audio: int | None = None,
        video: int | None = None,
        text: int,
    ) -> Layout:
        """A typical prompt: some text, a clip of 30 s at 1280 x 720, the rest of the text."""
        if audio:
            raise deaf(self)
        time, height, width = RELEASED.grid(EXAMPLE_SECONDS if seconds is None else seconds, 720, 1280)
        tokens = time * height * width if video is None else video
        frame = np.arange(tokens) // (height * width) * RELEASED.temporal
        before = min(PREFIX, text)
        return Layout.join(
            [
                Layout.of(Modality.TEXT, before),
                Layout.of(Modality.VIDEO, tokens, frame=frame),
                Layout.of(Modality.TEXT, text - before),
            ]
        )

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the Qwen2.5 decoder."""
        return qwen2_shape(config)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text model."""
        return model.get_submodule("model.language_model")

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The vision tower with its merger."""
        return (model.get_submodule("model.visual"),)
