"""The video track of a clip."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import repeat
from pathlib import Path

import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import Float, Int, UInt8

from fastav.errors import UnreadableMedia
from fastav.media._frames import FrameSource, Picture, ScannedFrames, SoughtFrames, View, decode_all, display_matrix
from fastav.media._open import MAX_SIDE, WHOLE_SECONDS, check_bytes, only, opened, stated_seconds
from fastav.media._timeline import Index, Timeline, last_shown, scan

Indices = Sequence[int] | Int[np.ndarray, " picked"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VideoTrack:
    """What is known of a video track without decoding it, and how to read its frames.

    frames: how many there are; the container's own count where it keeps one that holds.
    fps: average frames per second. duration: in seconds.
    width, height: in pixels, upright (after the rotation that the file asks for).
    """

    frames: int
    fps: float
    duration: float
    width: int
    height: int
    source: FrameSource = field(repr=False)

    def read(self, indices: Indices) -> UInt8[np.ndarray, "picked height width 3"]:
        """Return these frames as RGB, in the order given; repeats are decoded once.

        An index counts frames in the order shown, so `read(indices)` is what decoding everything and indexing gives.
        In a file over 10 minutes whose container has no frame table (all but MP4 and MOV), frame i is the one shown
        i / fps seconds after the first.

        Raises: IndexError if an index is not in [0, frames). UnreadableMedia if the file ends before a frame or the
        frame is damaged, or if the frames together take over 4.3 GB.
        """
        size = len(indices) * self.width * self.height * 3
        what = f"reading {len(indices)} frames of {self.width} x {self.height}"
        check_bytes(size, what, "ask for fewer frames at a time")
        wanted, place = self._unique(indices)
        pictures = np.empty((len(indices), self.height, self.width, 3), np.uint8)
        if wanted:
            for position, picture in enumerate(self.source.pick(wanted)):
                pictures[place == position] = picture
        return pictures

    def each(self, indices: Indices) -> Iterator[Picture]:
        """Yield these frames as `read` returns them, one at a time, each when it is decoded.

        Raises: ValueError if an index is lower than the one before it; else as `read`, however many bytes they are.
        """
        wanted, place = self._unique(indices)
        if (np.diff(place) < 0).any():
            raise ValueError("indices of frames that are taken one at a time must not fall")
        if wanted:
            for picture, times in zip(self.source.pick(wanted), np.bincount(place), strict=True):
                yield from repeat(picture, times)

    def seconds(self, indices: Indices) -> Float[np.ndarray, " picked"]:
        """When these frames are shown, in seconds from the start of the clip.

        Raises: IndexError if an index is not in [0, frames).
        """
        wanted, place = self._unique(indices)
        return self.source.seconds(wanted)[place] if wanted else np.empty(0)

    def _unique(self, indices: Indices) -> tuple[list[int], Int[np.ndarray, " picked"]]:
        for index in indices:
            if not 0 <= index < self.frames:
                raise IndexError(f"frame index {index} is not in [0, {self.frames})")
        wanted, place = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        return wanted.tolist(), place


def probe_video(path: Path, stream_index: int) -> VideoTrack:
    """Find out what the track is, decoding one frame.

    Raises: UnreadableMedia if no frame decodes, or frames are too large.
    """
    with opened(path) as container:
        stream = container.streams[stream_index]
        assert isinstance(stream, VideoStream)
        _check_size(path, stream.width, stream.height)
        view, first = _view(path, container, only(stream))
        index = Index.of(container, stream)
        counted = stream.frames if index is None else index.frames
        seconds = stated_seconds(container, stream)
        is_long = seconds is not None and seconds > WHOLE_SECONDS
        if is_long and index is None and (end := last_shown(container, stream)) is not None:
            seconds = float((end - first) * view.tick)
    if seconds is None or not is_long:
        return _scanned(view, counted)
    frames = max(1, round(seconds * view.fps)) if index is None else counted
    return _track(view, frames, seconds, SoughtFrames(view=view, index=index, first=first))


def _view(path: Path, container: InputContainer, stream: VideoStream) -> tuple[View, int]:
    """How to make arrays of the track's pictures, and when its first frame is shown, in ticks."""
    frame = _first_frame(container, stream)
    if frame is None:
        raise UnreadableMedia(f"the video track of {path.name} holds no frame that decodes", "is the file complete?")
    _check_size(path, frame.width, frame.height)
    view = View(
        path=path,
        stream=stream.index,
        width=frame.width,
        height=frame.height,
        matrix=display_matrix(frame),
        tick=stream.time_base or Fraction(1, 1_000_000),
        start=-(container.start_time or 0) / 1e6,
        fps=float(stream.average_rate or stream.guessed_rate or 25),
    )
    return view, frame.pts or 0


def _scanned(view: View, counted: int) -> VideoTrack:
    """The track of a file short enough to look at every packet; `counted` is the container's own number of frames."""
    with opened(view.path) as container:
        timeline = scan(container, view.track(container))
    if timeline is None:
        with opened(view.path) as container:
            found = sum(1 for _ in decode_all(container, view.track(container)))
        return _track(view, found, found / view.fps, ScannedFrames(view=view, timeline=None))
    frames = len(timeline.shown)
    seconds = float((timeline.end - int(timeline.shown[0])) * view.tick)
    view = view._replace(fps=_average_rate(view.fps, timeline, seconds))
    if counted - frames > max(2, counted / 100):
        # headers are often off by a frame or two; by more, the file is cut, and reading past the cut must fail
        frames, timeline = counted, timeline.before_cut()
    return _track(view, frames, seconds, ScannedFrames(view=view, timeline=timeline))


def _track(view: View, frames: int, duration: float, source: FrameSource) -> VideoTrack:
    width, height = (view.height, view.width) if view.turned else (view.width, view.height)
    return VideoTrack(frames=frames, fps=view.fps, duration=duration, width=width, height=height, source=source)


def _average_rate(stated: float, timeline: Timeline, seconds: float) -> float:
    """The container's rate if the frames bear it out within 1 %, else frames per second as counted."""
    counted = len(timeline.shown) / seconds if seconds > 0 else stated
    return stated if abs(counted / stated - 1) < 0.01 else counted


def _first_frame(container: InputContainer, stream: VideoStream) -> VideoFrame | None:
    """The first frame that decodes: a recording may begin in the middle of a group of pictures."""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except FFmpegError:
            continue
        if frames:
            return frames[0]
    return None


def _check_size(path: Path, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        message = f"{path.name} has frames of {width} x {height}; the limit is {MAX_SIDE} pixels a side"
        raise UnreadableMedia(message, "scale it down first")
