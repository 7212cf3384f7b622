"""Sampling of video frames as images, for models that take images but no videos."""

from math import ceil


def frame_indices(frames: int, seconds: float | int, *, max_frames: int) -> list[int]:
    """The frames to use: one per started second, at most `max_frames`, each in the middle of its part of the video."""
    count = min(max(1, ceil(seconds)), max_frames, frames)
    return [(2 * i + 1) * frames // (2 * count) for i in range(count)]
