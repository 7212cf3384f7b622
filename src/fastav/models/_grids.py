"""Videos whose tokens form a grid of time, height and width, as in the Qwen-VL families."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from fastav.errors import MediaError, reason_of
from fastav.models._adapters import iter_rows, prompt_ids
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
    merge = media_tokens.merge**2
    videos, images = iter_rows(inputs, "video_grid_thw"), iter_rows(inputs, "image_grid_thw")
    image_lengths = (int(np.prod(grid)) // merge for grid in images)
    for ids in prompt_ids(inputs):
        is_video = ids == media_tokens.video
        audio = np.zeros_like(is_video) if media_tokens.audio is None else ids == media_tokens.audio
        video, frame = _video_pieces(is_video, videos, merge, media_tokens.temporal)
        yield Pieces(
            video=video,
            image=pieces_of_lengths(ids == media_tokens.image, image_lengths),
            audio=pieces_of_lengths(audio, sounds),
            frame=frame,
            joins=sounds_touch,
        )


def _video_pieces(
    member: Bool[np.ndarray, " tokens"], grids: Iterator[Any], merge: int, temporal: int
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    """The video of each video token, and the first sampled frame that it shows there, from grids in patches.

    The frames are -1 if grids and tokens do not match.
    """
    steps: list[np.ndarray] = []
    total = int(member.sum())
    while sum(map(len, steps)) < total and (grid := next(grids, None)) is not None:
        time, height, width = (int(n) for n in grid)
        steps.append(np.repeat(np.arange(time) * temporal, height * width // merge))
    video = pieces_of_lengths(member, iter(map(len, steps)))
    frame = np.full(len(member), -1)
    if sum(map(len, steps)) == total and steps:
        frame[member] = np.concatenate(steps)
    return video, frame
