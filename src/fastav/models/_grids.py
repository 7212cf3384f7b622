"""Videos whose tokens form a grid of time, height and width, as in the Qwen-VL families."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from fastav.errors import MediaError, reason_of
from fastav.layout import Layout, Modality
from fastav.models._adapters import iter_rows, layout_from_masks, prompt_ids, with_seconds


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


def token_frames(
    tokens: int, grids: Iterator[Iterable[int]], *, merge: int, temporal: int
) -> Int[np.ndarray, " tokens"]:
    """The first sampled frame of each of a prompt's video tokens, from the grids (in patches) of its videos.

    Frame numbers continue from one video of a prompt to the next. All are -1 if grids and tokens do not match.
    """
    frames: list[np.ndarray] = []
    count = steps = 0
    while count < tokens and (grid := next(grids, None)) is not None:
        time, height, width = (int(n) for n in grid)
        step_tokens = height * width // merge**2
        frames.append(np.repeat(np.arange(steps, steps + time) * temporal, step_tokens))
        count, steps = count + time * step_tokens, steps + time
    return np.concatenate(frames) if frames and count == tokens else np.full(tokens, -1)


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


def grid_layouts(media_tokens: MediaTokens, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layout of each prompt of a batch, from the arguments of `forward` alone; seconds are unknown.

    An audio token has the frame of the last video token before it.
    """
    grids, layouts = iter_rows(inputs, "video_grid_thw"), []
    for ids in prompt_ids(inputs):
        video = ids == media_tokens.video
        audio = np.zeros_like(video) if media_tokens.audio is None else ids == media_tokens.audio
        video_frames = token_frames(int(video.sum()), grids, merge=media_tokens.merge, temporal=media_tokens.temporal)
        last_frame = np.concatenate([[-1], video_frames])[np.cumsum(video)]
        frame = np.where(video | audio, last_frame, -1)
        layouts.append(layout_from_masks(video, audio, image=ids == media_tokens.image, frame=frame))
    return tuple(layouts)


def with_frame_seconds(layout: Layout, *, frames: Float[np.ndarray, " frames"]) -> Layout:
    """The layout of a prompt about one clip, with seconds.

    frames: start of each sampled frame, in seconds. The seconds of audio tokens are unknown.
    """
    second = np.array(layout.second)
    video, audio = layout.modality == Modality.VIDEO, layout.modality == Modality.AUDIO
    second[video] = frames[layout.frame[video]]
    second[audio] = np.nan
    return with_seconds(layout, second)
