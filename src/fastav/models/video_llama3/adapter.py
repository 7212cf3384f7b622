"""What the rest of fastav must know about VideoLLaMA3."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int
from torch import nn
from transformers import PreTrainedModel

from fastav.layout import Layout
from fastav.models._adapters import host, of_places, prompts_of, rows_of
from fastav.models._grids import Grids, Places
from fastav.models._sight import SightAdapter

RELEASED = Grids(
    patch=14,
    merge=2,
    temporal=1,
    fps=1.0,
    least=4,
    most=180,
    min_pixels=12_544,
    max_pixels=12_845_056,  # of all frames together
)


class VideoLlama3Adapter(SightAdapter):
    """VideoLLaMA3: it sees and does not hear.

    Patches that hardly differ from the frame before have no token, so the number of tokens depends on what is shown.
    The time of every frame stands as text before its tokens, and is text in layouts too.
    """

    name = "video-llama3"
    architectures = frozenset({"VideoLlama3ForConditionalGeneration"})
    checkpoint = "lkhl/VideoLLaMA3-7B-Image-HF"
    config_class = "VideoLlama3Config"
    model_class = "VideoLlama3ForConditionalGeneration"
    processor_class = "VideoLlama3Processor"
    release: ClassVar[Mapping[str, Any]] = {
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
    }

    fps = 1.0  # the released processor names no rate, its authors' examples ask for this one
    prefix = 3  # the start of the user's message
    temporal = 1

    def released_grid(self, seconds: float | int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along time, height and width of a video of this length and size, in which everything moves.

        None of its tokens is left out for resembling the one before.
        """
        each = RELEASED.max_pixels // RELEASED.frames(seconds)  # all frames share the pixels
        return replace(RELEASED, max_pixels=each).grid(seconds, height, width)

    def read(self, places: Places, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, given which ids stand for media."""
        shown, layouts = _frames(inputs), []
        for ids in prompts_of(inputs):
            seen = ids == places.video
            frame = np.full(len(ids), -1)
            frame[seen] = _next(shown, int(seen.sum()))
            layouts.append(of_places(seen, np.zeros_like(seen), image=ids == places.image, frame=frame))
        return tuple(layouts)

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The vision tower and its projector."""
        return model.get_submodule("model.vision_model"), model.get_submodule("model.projector")


def _frames(inputs: Mapping[str, Any]) -> Iterator[tuple[int, Int[np.ndarray, " kept"]]]:
    """Of each video, how many frames it has, and which of them each token shows that is left of it."""
    kept, done = inputs.get("video_compression_mask"), 0
    kept = None if kept is None else host(kept)
    for grid, merge in zip(rows_of(inputs, "video_grid_thw"), rows_of(inputs, "video_merge_sizes"), strict=True):
        time, height, width = (int(n) for n in grid)
        frame = np.repeat(np.arange(time), height * width // int(merge) ** 2)
        yield time, frame if kept is None else frame[kept[done : done + len(frame)]]
        done += len(frame)


def _next(videos: Iterator[tuple[int, np.ndarray]], tokens: int) -> Int[np.ndarray, " tokens"]:
    """The frames that a prompt's video tokens show; those of later videos count on from earlier ones.

    -1 everywhere if the videos are not those of the tokens.
    """
    parts: list[np.ndarray] = []
    done = before = 0
    while done < tokens and (video := next(videos, None)) is not None:
        frames, frame = video
        parts.append(frame + before)
        done, before = done + len(frame), before + frames
    return np.concatenate(parts) if parts and done == tokens else np.full(tokens, -1)
