"""The adapter of VideoLLaMA3."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int
from torch import nn
from transformers import PreTrainedModel

from fastav.models._adapters import iter_rows, prompt_ids, to_numpy
from fastav.models._grids import Grids, MediaTokens
from fastav.models._pieces import Pieces, pieces_of_lengths, sounds_touch
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

    def pieces(self, media_tokens: MediaTokens, inputs: Mapping[str, Any]) -> Iterator[Pieces]:
        """The media tokens of each prompt of a batch, from the arguments of `forward` alone."""
        videos, images = _video_frames(inputs), iter_rows(inputs, "image_grid_thw")
        merges = iter_rows(inputs, "image_merge_sizes")
        image_lengths = (int(np.prod(grid)) // int(next(merges)) ** 2 for grid in images)
        for ids in prompt_ids(inputs):
            is_video = ids == media_tokens.video
            parts: list[np.ndarray] = []
            while sum(map(len, parts)) < is_video.sum() and (frames := next(videos, None)) is not None:
                parts.append(frames)
            frame = np.full(len(ids), -1)
            if parts and sum(map(len, parts)) == is_video.sum():
                frame[is_video] = np.concatenate(parts)
            yield Pieces(
                video=pieces_of_lengths(is_video, iter(map(len, parts))),
                image=pieces_of_lengths(ids == media_tokens.image, image_lengths),
                audio=np.full(len(ids), -1),
                frame=frame,
                joins=sounds_touch,
            )

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The vision tower and its projector."""
        return model.get_submodule("model.vision_model"), model.get_submodule("model.projector")


def _video_frames(inputs: Mapping[str, Any]) -> Iterator[Int[np.ndarray, " remaining"]]:
    """Of each video: the frame of each token that remains after compression."""
    mask, start = inputs.get("video_compression_mask"), 0
    mask = None if mask is None else to_numpy(mask)
    for grid, merge in zip(iter_rows(inputs, "video_grid_thw"), iter_rows(inputs, "video_merge_sizes"), strict=True):
        time, height, width = (int(n) for n in grid)
        frame = np.repeat(np.arange(time), height * width // int(merge) ** 2)
        yield frame if mask is None else frame[mask[start : start + len(frame)]]
        start += len(frame)
