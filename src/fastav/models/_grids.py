"""Videos whose tokens stand on a grid of time, height and width, as in the Qwen-VL line."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from fastav.errors import MediaError, reason_of
from fastav.layout import Layout, Modality
from fastav.models._adapters import of_places, prompts_of, rows_of, with_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Grids:
    """How frames become tokens.

    patch: pixels a side. merge: patches a side of a token. temporal: frames that a token shows. fps: sampled frames a
    second, between `least` and `most` of them. min_pixels, max_pixels: of a frame after scaling.
    video_tokens: most tokens of a video, which more frames share (None: no such limit).
    """

    patch: int
    merge: int
    temporal: int
    fps: float | int
    least: int
    most: int
    min_pixels: int
    max_pixels: int
    video_tokens: int | None = None

    def frames(self, seconds: float | int, fps: float | int = 25) -> int:
        """How many frames are sampled of a video of this length and rate."""
        there = max(1, round(seconds * fps))
        wanted = min(max(seconds * self.fps, self.least), self.most, there)
        return max(self.temporal, int(wanted) // self.temporal * self.temporal)

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


def frames_of(tokens: int, grids: Iterator[Iterable[int]], *, merge: int, temporal: int) -> Int[np.ndarray, " tokens"]:
    """The first sampled frame of each of a prompt's video tokens, by the grids (in patches) of its videos.

    Later videos of a prompt count on from earlier ones. -1 everywhere if the grids are not those of the tokens.
    """
    parts: list[np.ndarray] = []
    done = steps = 0
    while done < tokens and (grid := next(grids, None)) is not None:
        time, height, width = (int(n) for n in grid)
        each = height * width // merge**2
        parts.append(np.repeat(np.arange(steps, steps + time) * temporal, each))
        done, steps = done + time * each, steps + time
    return np.concatenate(parts) if parts and done == tokens else np.full(tokens, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Ids that stand for media, and how many patches (a side) and frames a video token shows.

    audio: None for families that do not hear.
    """

    video: int
    image: int
    audio: int | None = None
    merge: int
    temporal: int


def grid_layouts(places: Places, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layout of each prompt of a batch, from the arguments of `forward` alone; seconds are unknown.

    An audio token accompanies the frame of the last video token before it.
    """
    grids, layouts = rows_of(inputs, "video_grid_thw"), []
    for ids in prompts_of(inputs):
        video = ids == places.video
        audio = np.zeros_like(video) if places.audio is None else ids == places.audio
        shown = frames_of(int(video.sum()), grids, merge=places.merge, temporal=places.temporal)
        latest = np.concatenate([[-1], shown])[np.cumsum(video)]
        frame = np.where(video | audio, latest, -1)
        layouts.append(of_places(video, audio, image=ids == places.image, frame=frame))
    return tuple(layouts)


def timed(layout: Layout, *, frames: Float[np.ndarray, " frames"], audio_rate: float | int = 0) -> Layout:
    """The layout of a prompt about one clip, with seconds.

    frames: when each sampled frame is shown. audio_rate: audio tokens a second.
    """
    second = np.array(layout.second)
    video, audio = layout.modality == Modality.VIDEO, layout.modality == Modality.AUDIO
    second[video] = frames[layout.frame[video]]
    second[audio] = np.arange(audio.sum()) / audio_rate if audio_rate else np.nan
    return with_seconds(layout, second)
