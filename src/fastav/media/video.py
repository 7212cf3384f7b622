"""The video track of a clip."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import repeat

import numpy as np
from jaxtyping import Float, Int, UInt8

from fastav.errors import UnreadableMedia
from fastav.formatting import summary_repr
from fastav.media._frames import (
    DelayedFrames,
    Frame,
    FrameSource,
    ScannedFrames,
    SeekedFrames,
    StreamInfo,
    decode_all,
    display_matrix,
)
from fastav.media._open import MAX_SCAN_SECONDS, MAX_SIDE, check_bytes, declared_seconds, open_container, select_stream
from fastav.media._pyav import av
from fastav.media._source import Source
from fastav.media._timeline import SampleTable, Timeline, avi_timeline, packets, scan, track_end

Indices = Sequence[int] | Int[np.ndarray, " picked"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class VideoTrack:
    """A video track: its properties, which need no decoding, and its frames.

    frames: their number, from the data; in MP4 and MOV from the frame table.
    fps: average frames per second. duration: in seconds.
    width, height: in pixels, after the file's rotation.
    start: seconds from the start of the clip to the first frame. origin: the start of the clip on the file's own clock.
    """

    frames: int
    fps: float
    duration: float
    width: int
    height: int
    source: FrameSource
    start: float = 0.0
    origin: float = 0.0

    def __repr__(self) -> str:
        return summary_repr(self, "frames", "fps", "duration", "width", "height", "start")

    def from_start(self) -> "VideoTrack":
        """The track from the start of the clip on; before its own start, its first picture is repeated at its rate."""
        lead = round(self.start * self.fps)
        if lead <= 0:
            return self
        return replace(
            self,
            frames=self.frames + lead,
            duration=self.duration + self.start,
            source=DelayedFrames(source=self.source, lead=lead, seconds_before=self.start),
            start=0.0,
        )

    def read(self, indices: Indices) -> UInt8[np.ndarray, "picked height width 3"]:
        """Return these frames as RGB, in the order given; repeated indices are decoded once.

        Indices count frames in display order, so `read(indices)` is the same as decoding all frames and indexing. In a
        file over 10 minutes without a frame table (all formats but MP4, MOV and AVI), frame i is the one displayed i /
        fps seconds after the first.

        Raises: IndexError if an index is not in [0, frames). UnreadableMedia if the file ends before a frame or the
        frame is damaged, or if the frames together take over 4.3 GB.
        """
        size = len(indices) * self.width * self.height * 3
        what = f"reading {len(indices)} frames of {self.width} x {self.height}"
        check_bytes(size, what, "ask for fewer frames at a time")
        unique, inverse = self._unique(indices)
        pictures = np.empty((len(indices), self.height, self.width, 3), np.uint8)
        if unique:
            for position, picture in enumerate(self.source.pick(unique)):
                pictures[inverse == position] = picture
        return pictures

    def each(self, indices: Indices) -> Iterator[Frame]:
        """Yield these frames as `read` returns them, each as soon as it is decoded.

        Raises: ValueError if indices decrease; else as `read`, but without the limit on bytes.
        """
        unique, inverse = self._unique(indices)
        if (np.diff(inverse) < 0).any():
            raise ValueError("indices must not decrease, to yield frames one at a time")
        if unique:
            for picture, times in zip(self.source.pick(unique), np.bincount(inverse), strict=True):
                yield from repeat(picture, times)

    def seconds(self, indices: Indices) -> Float[np.ndarray, " picked"]:
        """The display times of these frames, in seconds from the start of the clip.

        Raises: IndexError if an index is not in [0, frames).
        """
        unique, inverse = self._unique(indices)
        return self.source.seconds(unique)[inverse] if unique else np.empty(0)

    def _unique(self, indices: Indices) -> tuple[list[int], Int[np.ndarray, " picked"]]:
        for index in indices:
            if not 0 <= index < self.frames:
                raise IndexError(f"frame index {index} is not in [0, {self.frames})")
        unique, inverse = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        return unique.tolist(), inverse


def probe_video(source: Source, stream_index: int, audio_start: float) -> VideoTrack:
    """The video track of a file. One frame is decoded.

    audio_start: the start of its sound on the container's clock; infinity if there is none. The clip starts with the
    earlier of the two tracks.
    Raises: UnreadableMedia if no frame decodes, or frames are too large.
    """
    with open_container(source) as container:
        stream = _video(container, stream_index)
        _check_size(source, stream.width, stream.height)
        info, first = _stream_info(source, container, select_stream(stream), audio_start)
        table = SampleTable.of(container, stream)
        declared = declared_seconds(container, stream)
        seconds, timeline = declared, None
        if table is None and declared is not None and declared > MAX_SCAN_SECONDS:
            if (timeline := avi_timeline(container, stream)) is not None:
                return _scanned_track(info, timeline, 0)
            if (end := track_end(container, stream)) is not None:
                seconds = float((end - first) * info.tick)
    if seconds is None or seconds <= MAX_SCAN_SECONDS:
        with open_container(source) as container:
            timeline = scan(container, info.track(container))
        return _scanned_track(info, timeline, 0 if table is None else table.frames)
    frames = max(1, round(seconds * info.fps)) if table is None else table.frames
    start = max(0.0, info.seconds_at(first))
    return _track(info, frames, seconds, SeekedFrames(info=info, table=table, first=first), start)


def _video(container: "av.container.InputContainer", index: int) -> "av.VideoStream":
    stream = container.streams[index]
    assert isinstance(stream, av.VideoStream)
    return stream


def _stream_info(
    source: Source, container: "av.container.InputContainer", stream: "av.VideoStream", audio_start: float
) -> tuple[StreamInfo, int]:
    """How the track's pictures become arrays, and the time of its first frame in ticks."""
    frame = _first_frame(container, stream)
    if frame is None:
        raise _no_frame_error(source)
    _check_size(source, frame.width, frame.height)
    tick = stream.time_base or Fraction(1, 1_000_000)
    info = StreamInfo(
        source=source,
        stream=stream.index,
        width=frame.width,
        height=frame.height,
        matrix=display_matrix(frame),
        tick=Fraction(tick.numerator, tick.denominator),  # PyAV 19 has its own Fraction class
        start=-min(audio_start, float((frame.pts or 0) * (stream.time_base or 0))),
        fps=float(stream.average_rate or stream.guessed_rate or 25),
    )
    return info, frame.pts or 0


def _no_frame_error(source: Source) -> UnreadableMedia:
    return UnreadableMedia(f"the video track of {source.name} holds no frame that decodes", "is the file complete?")


def _scanned_track(info: StreamInfo, timeline: Timeline | None, table_frames: int) -> VideoTrack:
    """The track of a file whose packets are all known.  table_frames: the length of its frame table, or 0."""
    if timeline is None:
        with open_container(info.source) as container:
            n_frames = sum(1 for _ in decode_all(container, info.track(container)))
        if not n_frames:
            raise _no_frame_error(info.source)
        return _track(info, n_frames, n_frames / info.fps, ScannedFrames(info=info, timeline=None), 0.0)
    frames, first = len(timeline.pts), int(timeline.pts[0])
    seconds = float((timeline.end - first) * info.tick)
    info = info._replace(fps=_average_rate(info.fps, timeline, seconds))
    if table_frames - frames > max(2, table_frames / 100):
        # tables are often wrong by a frame or two; otherwise the file is truncated, and reading past its end must fail
        frames, timeline = table_frames, timeline.complete_part()
    return _track(info, frames, seconds, ScannedFrames(info=info, timeline=timeline), max(0.0, info.seconds_at(first)))


def _track(info: StreamInfo, frames: int, duration: float, source: FrameSource, start: float) -> VideoTrack:
    width, height = (info.height, info.width) if info.swaps_sides else (info.width, info.height)
    return VideoTrack(
        frames=frames,
        fps=info.fps,
        duration=duration,
        width=width,
        height=height,
        source=source,
        start=start,
        origin=-info.start,
    )


def _average_rate(declared: float, timeline: Timeline, seconds: float) -> float:
    """The container's frame rate if it is within 1 % of the measured rate, else the measured rate."""
    measured = len(timeline.pts) / seconds if seconds > 0 else declared
    return declared if abs(measured / declared - 1) < 0.01 else measured


def _first_frame(container: "av.container.InputContainer", stream: "av.VideoStream") -> "av.VideoFrame | None":
    """The first frame that decodes; a recording can start in the middle of a group of pictures."""
    for packet in packets(container, stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            continue
        if frames:
            return frames[0]
    return None


def _check_size(source: Source, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        message = f"{source.name} has frames of {width} x {height}; the limit is {MAX_SIDE} pixels a side"
        raise UnreadableMedia(message, "scale it down first")
    source.check_pixels(width, height)
