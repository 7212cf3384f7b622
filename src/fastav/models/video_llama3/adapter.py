"""The adapter of VideoLLaMA3."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import PreTrainedModel

from fastav.adapter import EncoderAttention, EncoderCall
from fastav.layout import Modality
from fastav.models._adapters import iter_rows, prompt_ids, to_numpy
from fastav.models._boxes import grid_boxes, placed
from fastav.models._grids import Grids, MediaTokens
from fastav.models._patch_attention import rotated_attention
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

    def vision_attention(self) -> EncoderAttention:
        """The attention of the vision tower, within each frame."""
        return FrameAttention()


class Frames(NamedTuple):
    """The frames of one call of the tower.

    grids: of each video or image, its patches along time, height and width, and how many a side of a token.
    remaining: which of their tokens the prompts hold; None for all.
    """

    grids: Sequence[tuple[int, int, int, int]]
    remaining: Bool[Tensor, " tokens"] | None


class FrameAttention(EncoderAttention):
    """The attention in the vision tower's last layer, in which all patches of a frame attend to each other.

    It is scaled down as the tower scales its output down: with two patches a side, a token has the mean of its four.
    """

    modalities = (Modality.IMAGE, Modality.VIDEO)

    def modules(self, model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
        """The vision tower, and the attention of its last layer."""
        tower = model.get_submodule("model.vision_model")
        return tower, tower.get_submodule("encoder.layers")[-1].self_attn  # pyright: ignore[reportIndexIssue]

    def begin(self, call: EncoderCall) -> Frames:
        """The frames of the call; it waits for the device to read their sizes, as the tower does."""
        grids = zip(call.inputs["grid_thw"].tolist(), call.inputs["merge_sizes"].tolist(), strict=True)
        is_video = call.number > 0 or call.model_inputs.get("pixel_values") is None
        return Frames(
            grids=[(time, height, width, merge) for (time, height, width), merge in grids],
            remaining=call.model_inputs.get("video_compression_mask") if is_video else None,
        )

    def scores(
        self, attention: nn.Module, call: Frames, attention_inputs: Mapping[str, Any]
    ) -> Float[Tensor, " tokens"]:
        """The attention that each token receives: the mean over heads and its frame, scaled down.

        Where tokens are compressed, it waits for the device, as the model does.
        """
        lengths = [height * width for time, height, width, _ in call.grids for _ in range(time)]
        patches = rotated_attention(attention, lengths, attention_inputs)
        media = patches.split([time * height * width for time, height, width, _ in call.grids])
        tokens = torch.cat([_scaled_down(part, *grid) for part, grid in zip(media, call.grids, strict=True)])
        return tokens if call.remaining is None else tokens[call.remaining.to(tokens.device)]


def _scaled_down(
    patches: Float[Tensor, " patches"], time: int, height: int, width: int, merge: int
) -> Float[Tensor, " tokens"]:
    """The attention of a medium's tokens, from that of its patches, which are in order of tokens."""
    rows, columns = height // merge, width // merge
    frames = patches.view(time, rows, columns, merge, merge).transpose(2, 3).reshape(time, 1, height, width)
    return interpolate(frames, size=(rows, columns), mode="bilinear").flatten()


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
