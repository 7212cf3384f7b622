"""Animated WebP, which FFmpeg cannot decode; Pillow reads it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image

from fastav.errors import UnreadableMedia, reason_of
from fastav.media._frames import Frame
from fastav.media._open import MAX_SIDE
from fastav.media._source import Source
from fastav.media.video import VideoTrack

ANIMATED = 0x02  # a flag of the chunk VP8X
MIN_SECONDS, DEFAULT_SECONDS = 0.011, 0.1  # like browsers, show frames with a shorter duration for the default duration


def is_animated_webp(head: bytes) -> bool:
    """Whether a file with these first bytes is an animated WebP."""
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) > 20 and bool(head[20] & ANIMATED)


def probe_webp(source: Source) -> VideoTrack:
    """The track of an animated WebP. All frames are decoded once, one at a time.

    Raises: UnreadableMedia.
    """
    times, end = [], 0.0
    with _PillowErrors(source), Image.open(source.stream() if source.path is None else source.path) as image:
        width, height = image.size
        if max(width, height) > MAX_SIDE:
            message = f"{source.name} has frames of {width} x {height}; the limit is {MAX_SIDE} pixels a side"
            raise UnreadableMedia(message, "scale it down first")
        source.check_pixels(width, height)
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            times.append(end)
            seconds = image.info.get("duration", 0) / 1000
            end += seconds if seconds >= MIN_SECONDS else DEFAULT_SECONDS
    frames = WebpFrames(source=source, times=np.array(times))
    return VideoTrack(frames=len(times), fps=len(times) / end, duration=end, width=width, height=height, source=frames)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WebpFrames:
    """Frames of an animated WebP; each is drawn over the previous ones.  times: the display time of each."""

    source: Source
    times: Float[np.ndarray, " frames"]

    def pick(self, indices: list[int]) -> Iterator[Frame]:
        """See `FrameSource`."""
        source = self.source
        source.check()
        with _PillowErrors(source), Image.open(source.stream() if source.path is None else source.path) as image:
            for index in indices:
                image.seek(index)
                yield np.asarray(image.convert("RGB"), np.uint8)

    def seconds(self, indices: list[int]) -> Float[np.ndarray, " indices"]:
        """See `FrameSource`."""
        return self.times[indices]


class _PillowErrors:
    """Turns Pillow's errors, which have many types, into UnreadableMedia."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __enter__(self) -> None:
        return

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, UnreadableMedia):
            message = f"{self._source.name} cannot be read: {reason_of(error)}"
            raise UnreadableMedia(message, "is the file complete?") from error
