"""Videos whose tokens form a grid of time, height and width, as in the Qwen-VL families."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from fastav.errors import MediaError, reason_of
from fastav.models._adapters import iter_rows, prompt_ids
from fastav.models._boxes import grid_boxes, placed
from fastav.models._pieces import Pieces, pieces_of_lengths, sounds_touch


@dataclass(frozen=True, slots=True, kw_only=True)
class Grids:
    """The settings by which frames become tokens.

    patch: pixels per side. merge: patches per side of a token. temporal: frames per token. fps: sampled frames per
    second, `min_frames` to `max_frames` in all. min_pixels, max_pixels: of a frame after resizing. video_tokens: the
    maximum per video, shared by its frames (None: no such limit).
    """

    patch: int
    merge: int
    temporal: int
    fps: float | int
    min_frames: int
    max_frames: int
    min_pixels: int
    max_pixels: int
    video_tokens: int | None = None

    def frames(self, seconds: float | int, fps: float | int = 25) -> int:
        """The number of frames that are sampled from a video of this length and rate."""
        available = max(1, round(seconds * fps))
        sampled = min(max(seconds * self.fps, self.min_frames), self.max_frames, available)
        return max(self.temporal, int(sampled) // self.temporal * self.temporal)

    def grid(self, seconds: float | int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along time, height and width of a video of this length and size.  Raises: MediaError."""
        frames, side, limit = self.frames(seconds), self.patch * self.merge, self.max_pixels
        if self.video_tokens is not None:
            share = int(self.video_tokens * side**2 * 0.9) * self.temporal // frames
            limit = max(min(limit, share), int(self.min_pixels * 1.05))
        try:
            height, width = smart_resize(height, width, side, self.min_pixels, limit)
        except ValueError as error:
            raise MediaError(f"frames of {width} x {height} cannot be used: {reason_of(error)}") from None
        return frames // self.temporal, height // side, width // side


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaTokens:
    """The token ids of media, and how many patches per side and how many frames a video token covers.

    audio: None for families that take no audio.
    """

    video: int
    image: int
    audio: int | None = None
    merge: int
    temporal: int


def image_tokens(image: int, audio: int) -> MediaTokens:
    """The token ids of a family that takes images and sound, and no videos."""
    return MediaTokens(video=-1, image=image, audio=audio, merge=1, temporal=1)


def grid_pieces(media_tokens: MediaTokens, inputs: Mapping[str, Any], sounds: Iterator[int]) -> Iterator[Pieces]:
    """The pieces of each prompt of a batch, from the arguments of `forward` alone.  sounds: tokens of each sound."""
    merge = media_tokens.merge
    videos, images = iter_rows(inputs, "video_grid_thw"), iter_rows(inputs, "image_grid_thw")
    for ids in prompt_ids(inputs):
        is_video, is_image = ids == media_tokens.video, ids == media_tokens.image
        audio = np.zeros_like(is_video) if media_tokens.audio is None else ids == media_tokens.audio
        video, step, video_box = _pieces_on_grids(is_video, videos, merge)
        image, _, image_box = _pieces_on_grids(is_image, images, merge)
        yield Pieces(
            video=video,
            image=image,
            audio=pieces_of_lengths(audio, sounds),
            frame=np.where(step >= 0, step * media_tokens.temporal, -1),
            joins=sounds_touch,
            box=np.where(is_image[:, None], image_box, video_box),
        )


def _pieces_on_grids(
    member: Bool[np.ndarray, " tokens"], grids: Iterator[Any], merge: int
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"], Float32[np.ndarray, "tokens 4"]]:
    """The video or image of each token of the mask, its step in time there and its box, from grids in patches.

    Steps are -1 and boxes NaN if grids and tokens do not match.
    """
    steps, boxes, total = list[np.ndarray](), list[np.ndarray](), int(member.sum())
    while sum(map(len, steps)) < total and (grid := next(grids, None)) is not None:
        time, height, width = (int(n) for n in grid)
        shown = grid_boxes(height // merge, width // merge)
        steps.append(np.repeat(np.arange(time), len(shown)))
        boxes.append(np.tile(shown, (time, 1)))
    step = np.full(len(member), -1)
    if sum(map(len, steps)) == total and steps:
        step[member] = np.concatenate(steps)
    piece = pieces_of_lengths(member, iter(map(len, steps)))
    return piece, step, placed(np.concatenate([*boxes, np.zeros((0, 4), np.float32)]), member)
