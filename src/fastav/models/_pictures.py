"""Videos shown as a few pictures, for models that take no videos."""

from math import ceil


def frame_indices(frames: int, seconds: float | int, *, most: int) -> list[int]:
    """The frames that are shown: one for every second begun, at most so many, each in the middle of its part."""
    shown = min(max(1, ceil(seconds)), most, frames)
    return [(2 * i + 1) * frames // (2 * shown) for i in range(shown)]
