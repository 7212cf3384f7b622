"""The adapter of VideoLLaMA3."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int
from torch import nn
from transformers import PreTrainedModel

from fastav.layout import Layout
from fastav.models._adapters import iter_rows, layout_from_masks, prompt_ids, to_numpy
from fastav.models._grids import Grids, MediaTokens
from fastav.models._video_only import VideoOnlyAdapter

RELEASE = Grids(
    patch=14,
    merge=2,
    temporal=1,
    fps=1.0,
    min_frames=4,
    max_frames=180,
    min_pixels=12_544,
    max_pixels=12_845_056,  # of all frames together
)


class VideoLlama3Adapter(VideoOnlyAdapter):
    """VideoLLaMA3: video, no audio.

    Patches that hardly differ from the previous frame have no token, so the number of tokens depends on the content.
    Prompts contain the time of every frame as text before its tokens; it is text in layouts, too.
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

    fps = 1.0  # the authors' examples; the released processor defines no rate
    prefix = 3  # the start of the user's message
    temporal = 1

    def release_grid(self, seconds: float | int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens of a video of this length and size in the released model, along time, height and width.

        In this video everything moves, so that no token is removed for its similarity to the previous frame.
        """
        frame_pixels = RELEASE.max_pixels // RELEASE.frames(seconds)  # all frames share the pixels
        return replace(RELEASE, max_pixels=frame_pixels).grid(seconds, height, width)

    def read_layouts(self, media_tokens: MediaTokens, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the ids of media tokens."""
        videos, layouts = _video_frames(inputs), []
        for ids in prompt_ids(inputs):
            video = ids == media_tokens.video
            frame = np.full(len(ids), -1)
            frame[video] = _prompt_frames(videos, int(video.sum()))
            layouts.append(layout_from_masks(video, np.zeros_like(video), image=ids == media_tokens.image, frame=frame))
        return tuple(layouts)

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The vision tower and its projector."""
        return model.get_submodule("model.vision_model"), model.get_submodule("model.projector")


def _video_frames(inputs: Mapping[str, Any]) -> Iterator[tuple[int, Int[np.ndarray, " remaining"]]]:
    """Of each video: its number of frames, and the frame of each token that remains after compression."""
    mask, start = inputs.get("video_compression_mask"), 0
    mask = None if mask is None else to_numpy(mask)
    for grid, merge in zip(iter_rows(inputs, "video_grid_thw"), iter_rows(inputs, "video_merge_sizes"), strict=True):
        time, height, width = (int(n) for n in grid)
        frame = np.repeat(np.arange(time), height * width // int(merge) ** 2)
        yield time, frame if mask is None else frame[mask[start : start + len(frame)]]
        start += len(frame)


def _prompt_frames(videos: Iterator[tuple[int, np.ndarray]], tokens: int) -> Int[np.ndarray, " tokens"]:
    """The frame of each of a prompt's video tokens; frame numbers continue from one video to the next.

    All are -1 if videos and tokens do not match.
    """
    parts: list[np.ndarray] = []
    count = previous_frames = 0
    while count < tokens and (video := next(videos, None)) is not None:
        n_frames, frame = video
        parts.append(frame + previous_frames)
        count, previous_frames = count + len(frame), previous_frames + n_frames
    return np.concatenate(parts) if parts and count == tokens else np.full(tokens, -1)
