"""Sources of video frames: an array, a file whose packets were all scanned, or a long file with seeks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from fastav.errors import UnreadableMedia
from fastav.media._open import open_container, select_stream
from fastav.media._pyav import av
from fastav.media._source import Source
from fastav.media._timeline import SampleTable, Timeline, packets, seek_and_decode

MAX_UNKNOWN_KINDS = 64
"""How many kinds of side data that PyAV does not know a frame may have."""

JUMP_SECONDS = 4.0
"""In a long file, frames further ahead than this are reached by a seek; nearer ones by decoding."""

Frame = UInt8[np.ndarray, "height width 3"]


@runtime_checkable
class FrameSource(Protocol):
    """Frames by index. `indices` are sorted, unique and within the track."""

    def pick(self, indices: list[int]) -> Iterator[Frame]:
        """The pictures, in the order of `indices`."""
        ...

    def seconds(self, indices: list[int]) -> Float[np.ndarray, " indices"]:
        """The time of each frame, in seconds from the start of the clip."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayFrames:
    """Frames in memory."""

    pictures: UInt8[np.ndarray, "frames height width 3"]
    fps: float

    def pick(self, indices: list[int]) -> Iterator[Frame]:
        """See `FrameSource`."""
        return (self.pictures[index] for index in indices)

    def seconds(self, indices: list[int]) -> Float[np.ndarray, " indices"]:
        """See `FrameSource`."""
        return np.array(indices, np.float64) / self.fps


class StreamInfo(NamedTuple):
    """How the pictures of a video stream become arrays.

    stream: index of the stream in its container.
    width, height: as stored, before rotation, in pixels.
    matrix: the 2 x 2 part of the display matrix, row by row.
    tick: seconds per time unit of the stream.
    start: seconds from the start of the clip to time 0 of the stream.
    fps: average frames per second.
    """

    source: Source
    stream: int
    width: int
    height: int
    matrix: tuple[int, int, int, int]
    tick: Fraction
    start: float
    fps: float

    @property
    def swaps_sides(self) -> bool:
        """Whether the rotation swaps width and height."""
        a, b, _, _ = self.matrix
        return abs(b) > abs(a)

    def track(self, container: "av.container.InputContainer") -> "av.VideoStream":
        """The stream in its open container, ready to decode."""
        stream = container.streams[self.stream]
        assert isinstance(stream, av.VideoStream)
        return select_stream(stream)

    def picture(self, index: int, frame: "av.VideoFrame") -> Frame:
        """A decoded frame as upright RGB."""
        if frame.is_corrupt:
            raise UnreadableMedia(f"frame {index} of {self.source.name} is damaged", "is the file complete?")
        # by default PyAV starts threads for each picture, which takes longer than the conversion
        rgb = frame.to_ndarray(format="rgb24", width=self.width, height=self.height, threads=1)
        return upright(np.asarray(rgb, np.uint8), self.matrix)

    def end_error(self, index: int, end: float | None) -> UnreadableMedia:
        """The error for a frame that the file should have, but does not."""
        position = "" if end is None else f": its video ends at {max(0.0, end):.2f} s"
        message = f"frame {index} of {self.source.name} cannot be decoded{position}"
        return UnreadableMedia(message, "the file is cut short or damaged: copy or record it again")

    def seconds_at(self, ticks: int) -> float:
        """The time in seconds from the start of the clip."""
        return float(ticks * self.tick) + self.start


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScannedFrames:
    """Frames of a file whose packets were all scanned; indices are exact.

    timeline: None if the packets do not tell the order; then frames are counted while decoding from the start.
    """

    info: StreamInfo
    timeline: Timeline | None

    def pick(self, indices: list[int]) -> Iterator[Frame]:
        """See `FrameSource`."""
        n_done = 0
        if self.timeline is not None:
            if (n_known := len(self.timeline.pts)) <= indices[-1]:
                raise self.info.end_error(
                    next(i for i in indices if i >= n_known), self.info.seconds_at(self.timeline.end)
                )
            for picture in self._seek(indices, self.timeline):
                n_done += 1
                yield picture
        if n_done < len(indices):
            yield from self._decode_and_count(indices[n_done:])

    def seconds(self, indices: list[int]) -> Float[np.ndarray, " indices"]:
        """See `FrameSource`."""
        if self.timeline is None or not len(self.timeline.pts):
            return np.array(indices, np.float64) / self.info.fps
        pts, last = self.timeline.pts, len(self.timeline.pts) - 1
        extra = [max(0, i - last) / self.info.fps for i in indices]
        return np.array([self.info.seconds_at(int(pts[min(i, last)])) for i in indices]) + extra

    def _seek(self, indices: list[int], timeline: Timeline) -> Iterator[Frame]:
        """Seek from keyframe to keyframe; stop early if the decoder's frames are not those of the packets."""
        pts = timeline.pts
        with open_container(self.info.source) as container:
            stream = self.info.track(container)
            frame, frames, rank = None, iter(()), -1
            for index in indices:
                if frame is None or timeline.key_rank[timeline.nearest_key(index)] > rank:
                    entry = seek_and_decode(container, stream, timeline.entries(index), int(pts[index]))
                    if entry is None:
                        return
                    frame, frames = entry
                    rank = int(np.searchsorted(pts, frame.pts or 0))
                while rank < index and frame is not None and frame.pts == pts[rank]:
                    frame, rank = next(frames, None), rank + 1
                if frame is None or frame.pts != pts[index]:
                    return
                yield self.info.picture(index, frame)

    def _decode_and_count(self, indices: list[int]) -> Iterator[Frame]:
        """Decode from the start and count frames."""
        end = None
        remaining = iter(indices)
        index = next(remaining)
        with open_container(self.info.source) as container:
            for count, frame in enumerate(decode_all(container, self.info.track(container))):
                end = None if frame.pts is None else self.info.seconds_at(frame.pts)
                if count == index:
                    yield self.info.picture(index, frame)
                    if (index := next(remaining, -1)) < 0:
                        return
        raise self.info.end_error(index, end)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeekedFrames:
    """Frames of a file that is too long to scan.

    table: the sample table; with it indices are exact. Without it, frame i is the one displayed at i / fps seconds.
    first: the time of the first frame, in ticks.
    """

    info: StreamInfo
    table: SampleTable | None
    first: int

    def pick(self, indices: list[int]) -> Iterator[Frame]:
        """See `FrameSource`."""
        jump = int(JUMP_SECONDS / self.info.tick)
        with open_container(self.info.source) as container:
            stream = self.info.track(container)
            targets = self._targets(container, stream, indices)
            current, next_frame, frames = None, None, iter(())
            for index, target in zip(indices, targets, strict=True):
                if current is None or target - (current.pts or 0) > jump:
                    entry = seek_and_decode(container, stream, self._entries(target), target)
                    if entry is None:
                        raise self.info.end_error(index, None)
                    (current, frames), next_frame = entry, None
                while (current.pts or 0) < target and (next_frame := next_frame or next(frames, None)) is not None:
                    if (next_frame.pts or 0) > target:
                        break
                    current, next_frame = next_frame, None
                self._check(index, target, current, next_frame)
                yield self.info.picture(index, current)

    def seconds(self, indices: list[int]) -> Float[np.ndarray, " indices"]:
        """See `FrameSource`."""
        if self.table is None:
            return self.info.seconds_at(self.first) + np.array(indices, np.float64) / self.info.fps
        with open_container(self.info.source) as container:
            targets = self._targets(container, self.info.track(container), indices)
        return np.array([self.info.seconds_at(t) for t in targets], np.float64)

    def _targets(
        self, container: "av.container.InputContainer", stream: "av.VideoStream", indices: list[int]
    ) -> list[int]:
        """The time of each frame in ticks: exact, or the middle of its nominal interval."""
        if self.table is None:
            return [nominal_ticks(i, self.first, self.info.fps, self.info.tick) for i in indices]
        targets = []
        for frame in indices:
            pts = self.table.pts_of(container, stream, frame)
            if pts is None:
                raise self.info.end_error(frame, None)
            targets.append(pts)
        return targets

    def _entries(self, target: int) -> list[int]:
        return [target - int(back / self.info.tick) for back in (0, 1, 10, 60)]

    def _check(self, index: int, target: int, current: "av.VideoFrame", next_frame: "av.VideoFrame | None") -> None:
        """Refuse a wrong frame: the stream ended before it, or the table is wrong."""
        lag = float((target - (current.pts or 0)) * self.info.tick)
        if (self.table is not None and lag) or (next_frame is None and lag > 2 / self.info.fps):
            raise self.info.end_error(index, self.info.seconds_at(current.pts or 0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DelayedFrames:
    """Frames of a track that starts late; the first picture is repeated `lead` times before it.

    seconds_before: the delay in seconds.
    """

    source: FrameSource
    lead: int
    seconds_before: float

    def pick(self, indices: list[int]) -> Iterator[Frame]:
        """See `FrameSource`."""
        source_indices = [max(0, index - self.lead) for index in indices]
        pictures = self.source.pick(sorted(set(source_indices)))
        last, picture = -1, None
        for index in source_indices:
            if index != last:
                last, picture = index, next(pictures)
            assert picture is not None
            yield picture

    def seconds(self, indices: list[int]) -> Float[np.ndarray, " indices"]:
        """See `FrameSource`."""
        lead_seconds = [index * self.seconds_before / self.lead for index in indices if index < self.lead]
        source_indices = [index - self.lead for index in indices if index >= self.lead]
        return np.concatenate(
            [np.array(lead_seconds, np.float64), self.source.seconds(source_indices) if source_indices else np.empty(0)]
        )


def nominal_ticks(frame: int, first: int, fps: float, tick: Fraction) -> int:
    """The middle of the display interval of a frame at a constant rate, in ticks."""
    return first + int((frame + 0.5) / fps / tick)


def upright(
    picture: UInt8[np.ndarray, "rows columns 3"], matrix: tuple[int, int, int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    """Rotate and mirror a picture in steps of 90 degrees, by the 2 x 2 part of a display matrix.

    The matrix (a, b, c, d) maps column x and row y to column a x + c y and row b x + d y.
    """
    a, b, c, d = matrix
    if abs(b) > abs(a):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def display_matrix(frame: "av.VideoFrame") -> tuple[int, int, int, int]:
    """The 2 x 2 part of a frame's display matrix; the identity if it has none."""
    data = _side_data(frame).get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    return a, b, c, d


def _side_data(frame: "av.VideoFrame") -> Any:
    """The side data of a frame, as far as PyAV knows its kinds.

    PyAV before 19 raises if a frame has a kind that only FFmpeg knows, such as EXIF. A filter of FFmpeg then removes
    that kind.
    """
    for _ in range(MAX_UNKNOWN_KINDS):
        try:
            return frame.side_data
        except ValueError as error:
            kind = re.match(r"\d+", str(error))
            if kind is None:
                raise
            frame = _without(frame, kind[0])
    return {}


def _without(frame: "av.VideoFrame", kind: str) -> "av.VideoFrame":
    """The frame without side data of a kind, given by its number in FFmpeg."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 25)
    )
    strip, sink = graph.add("sidedata", mode="delete", type=kind), graph.add("buffersink")
    source.link_to(strip)
    strip.link_to(sink)
    graph.configure()
    graph.vpush(frame)
    return graph.vpull()


def decode_all(container: "av.container.InputContainer", stream: "av.VideoStream") -> "Iterator[av.VideoFrame]":
    """Every frame from the first that decodes, until the data end or cannot be decoded."""
    started = False
    try:
        for packet in packets(container, stream):
            try:
                for frame in packet.decode():
                    started = True
                    yield frame
            except av.error.FFmpegError:
                if started:
                    return
    except av.error.FFmpegError:
        return
