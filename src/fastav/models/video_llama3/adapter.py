"""The adapter of VideoLLaMA3."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Int
from torch import nn
from transformers import PreTrainedModel

from fastav.models._adapters import iter_rows, prompt_ids, to_numpy
from fastav.models._boxes import grid_boxes, placed
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
        videos, images = _videos(inputs), _grids(inputs, "image")
        for ids in prompt_ids(inputs):
            is_video, is_image = ids == media_tokens.video, ids == media_tokens.image
            frames, video_boxes = _parts(videos, int(is_video.sum()))
            image_parts, image_boxes = _parts(images, int(is_image.sum()))
            frame = np.full(len(ids), -1)
            if frames and sum(map(len, frames)) == is_video.sum():
                frame[is_video] = np.concatenate(frames)
            yield Pieces(
                video=pieces_of_lengths(is_video, iter(map(len, frames))),
                image=pieces_of_lengths(is_image, iter(map(len, image_parts))),
                audio=np.full(len(ids), -1),
                frame=frame,
                joins=sounds_touch,
                box=np.where(is_image[:, None], placed(image_boxes, is_image), placed(video_boxes, is_video)),
            )

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The vision tower and its projector."""
        return model.get_submodule("model.vision_model"), model.get_submodule("model.projector")


FramesAndBoxes = tuple[Int[np.ndarray, " tokens"], Float32[np.ndarray, "tokens 4"]]


def _videos(inputs: Mapping[str, Any]) -> Iterator[FramesAndBoxes]:
    """Of each video: frame and box of each token that remains after compression."""
    mask, start = inputs.get("video_compression_mask"), 0
    mask = None if mask is None else to_numpy(mask)
    for frame, box in _grids(inputs, "video"):
        remaining = slice(None) if mask is None else mask[start : start + len(frame)]
        yield frame[remaining], box[remaining]
        start += len(frame)


def _grids(inputs: Mapping[str, Any], kind: str) -> Iterator[FramesAndBoxes]:
    """Frame and box of each token of each grid.  kind: `video` or `image`."""
    sizes = zip(iter_rows(inputs, f"{kind}_grid_thw"), iter_rows(inputs, f"{kind}_merge_sizes"), strict=True)
    for (time, height, width), merge in sizes:
        shown = grid_boxes(int(height // merge), int(width // merge))
        yield np.repeat(np.arange(time), len(shown)), np.tile(shown, (int(time), 1))


def _parts(
    media: Iterator[FramesAndBoxes], tokens: int
) -> tuple[list[Int[np.ndarray, " _"]], Float32[np.ndarray, "boxes 4"]]:
    """The frames of the next media with so many tokens, by medium, and the boxes of all."""
    frames, boxes = list[np.ndarray](), [np.zeros((0, 4), np.float32)]
    while sum(map(len, frames)) < tokens and (one := next(media, None)) is not None:
        frames.append(one[0])
        boxes.append(one[1])
    return frames, np.concatenate(boxes)
