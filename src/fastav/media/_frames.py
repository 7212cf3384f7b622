"""Where the frames of a video track come from: an array, a file scanned whole, or a long file that is jumped in."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from fastav.errors import UnreadableMedia
from fastav.media._open import only, opened
from fastav.media._pyav import av
from fastav.media._source import Source
from fastav.media._timeline import Index, Timeline, enter, packets

MOST_UNKNOWN = 64
"""Kinds of side data without a name that a frame may have."""

JUMP_SECONDS = 4.0
"""In a long file, a frame this far ahead is sought; a nearer one is reached by decoding on."""

Picture = UInt8[np.ndarray, "height width 3"]


@runtime_checkable
class FrameSource(Protocol):
    """Frames by index. `wanted` is sorted, without repeats and within the track."""

    def pick(self, wanted: list[int]) -> Iterator[Picture]:
        """The pictures, in the order of `wanted`."""
        ...

    def seconds(self, wanted: list[int]) -> Float[np.ndarray, " wanted"]:
        """When each frame is shown, from the clip's start."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayFrames:
    """Frames that are already in memory."""

    pictures: UInt8[np.ndarray, "frames height width 3"]
    fps: float

    def pick(self, wanted: list[int]) -> Iterator[Picture]:
        """See `FrameSource`."""
        return (self.pictures[index] for index in wanted)

    def seconds(self, wanted: list[int]) -> Float[np.ndarray, " wanted"]:
        """See `FrameSource`."""
        return np.array(wanted, np.float64) / self.fps


class View(NamedTuple):
    """How the pictures of one track in a file become arrays.

    stream: index of the stream in its container.
    width, height: as stored, before turning, in pixels.
    matrix: the 2 x 2 part of the display matrix, row by row.
    tick: seconds per unit of time.
    start: seconds from the clip's start to the time 0 of the track.
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
    def turned(self) -> bool:
        """Whether showing the pictures swaps width and height."""
        a, b, _, _ = self.matrix
        return abs(b) > abs(a)

    def track(self, container: "av.container.InputContainer") -> "av.VideoStream":
        """The track in its opened container, ready to decode."""
        stream = container.streams[self.stream]
        assert isinstance(stream, av.VideoStream)
        return only(stream)

    def picture(self, index: int, frame: "av.VideoFrame") -> Picture:
        """A decoded frame, as RGB and upright."""
        if frame.is_corrupt:
            raise UnreadableMedia(f"frame {index} of {self.source.name} is damaged", "is the file complete?")
        # left to itself, PyAV starts threads for each picture, which takes longer than converting it
        rgb = frame.to_ndarray(format="rgb24", width=self.width, height=self.height, threads=1)
        return upright(np.asarray(rgb, np.uint8), self.matrix)

    def ends(self, index: int, end: float | None) -> UnreadableMedia:
        """The error for a frame that should be there and is not."""
        where = "" if end is None else f": its video ends at {max(0.0, end):.2f} s"
        message = f"frame {index} of {self.source.name} cannot be decoded{where}"
        return UnreadableMedia(message, "the file is cut short or damaged: copy or record it again")

    def at(self, ticks: int) -> float:
        """Seconds from the clip's start."""
        return float(ticks * self.tick) + self.start


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScannedFrames:
    """Frames of a file whose every packet was looked at, so indices are exact.

    timeline: None where the packets do not tell the order; then frames are counted while decoding from the start.
    """

    view: View
    timeline: Timeline | None

    def pick(self, wanted: list[int]) -> Iterator[Picture]:
        """See `FrameSource`."""
        done = 0
        if self.timeline is not None:
            if (known := len(self.timeline.shown)) <= wanted[-1]:
                raise self.view.ends(next(i for i in wanted if i >= known), self.view.at(self.timeline.end))
            for picked in self._seek(wanted, self.timeline):
                done += 1
                yield picked
        if done < len(wanted):
            yield from self._count(wanted[done:])

    def seconds(self, wanted: list[int]) -> Float[np.ndarray, " wanted"]:
        """See `FrameSource`."""
        if self.timeline is None or not len(self.timeline.shown):
            return np.array(wanted, np.float64) / self.view.fps
        shown, last = self.timeline.shown, len(self.timeline.shown) - 1
        beyond = [max(0, i - last) / self.view.fps for i in wanted]
        return np.array([self.view.at(int(shown[min(i, last)])) for i in wanted]) + beyond

    def _seek(self, wanted: list[int], timeline: Timeline) -> Iterator[Picture]:
        """Jump from keyframe to keyframe; stop early if the decoder's frames are not those the packets promised."""
        shown = timeline.shown
        with opened(self.view.source) as container:
            stream = self.view.track(container)
            frame, frames, rank = None, iter(()), -1
            for index in wanted:
                if frame is None or timeline.key_rank[timeline.nearest_key(index)] > rank:
                    entered = enter(container, stream, timeline.entries(index), int(shown[index]))
                    if entered is None:
                        return
                    frame, frames = entered
                    rank = int(np.searchsorted(shown, frame.pts or 0))
                while rank < index and frame is not None and frame.pts == shown[rank]:
                    frame, rank = next(frames, None), rank + 1
                if frame is None or frame.pts != shown[index]:
                    return
                yield self.view.picture(index, frame)

    def _count(self, wanted: list[int]) -> Iterator[Picture]:
        """Decode from the start and count."""
        end = None
        remaining = iter(wanted)
        index = next(remaining)
        with opened(self.view.source) as container:
            for count, frame in enumerate(decode_all(container, self.view.track(container))):
                end = None if frame.pts is None else self.view.at(frame.pts)
                if count == index:
                    yield self.view.picture(index, frame)
                    if (index := next(remaining, -1)) < 0:
                        return
        raise self.view.ends(index, end)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SoughtFrames:
    """Frames of a file too long to scan.

    index: the sample table; with it indices are exact. Without one, frame i is what is shown at i / fps seconds.
    first: when the first frame is shown, in ticks.
    """

    view: View
    index: Index | None
    first: int

    def pick(self, wanted: list[int]) -> Iterator[Picture]:
        """See `FrameSource`."""
        jump = int(JUMP_SECONDS / self.view.tick)
        with opened(self.view.source) as container:
            stream = self.view.track(container)
            targets = self._targets(container, stream, wanted)
            now, ahead, frames = None, None, iter(())
            for index, target in zip(wanted, targets, strict=True):
                if now is None or target - (now.pts or 0) > jump:
                    entered = enter(container, stream, self._entries(target), target)
                    if entered is None:
                        raise self.view.ends(index, None)
                    (now, frames), ahead = entered, None
                while (now.pts or 0) < target and (ahead := ahead or next(frames, None)) is not None:
                    if (ahead.pts or 0) > target:
                        break
                    now, ahead = ahead, None
                self._check(index, target, now, ahead)
                yield self.view.picture(index, now)

    def seconds(self, wanted: list[int]) -> Float[np.ndarray, " wanted"]:
        """See `FrameSource`."""
        if self.index is None:
            return self.view.at(self.first) + np.array(wanted, np.float64) / self.view.fps
        with opened(self.view.source) as container:
            targets = self._targets(container, self.view.track(container), wanted)
        return np.array([self.view.at(t) for t in targets], np.float64)

    def _targets(
        self, container: "av.container.InputContainer", stream: "av.VideoStream", wanted: list[int]
    ) -> list[int]:
        """When to look for each frame, in ticks: exactly, or the middle of its nominal time."""
        if self.index is None:
            return [nominal(i, self.first, self.view.fps, self.view.tick) for i in wanted]
        targets = []
        for frame in wanted:
            shown = self.index.shown(container, stream, frame)
            if shown is None:
                raise self.view.ends(frame, None)
            targets.append(shown)
        return targets

    def _entries(self, target: int) -> list[int]:
        return [target - int(back / self.view.tick) for back in (0, 1, 10, 60)]

    def _check(self, index: int, target: int, now: "av.VideoFrame", ahead: "av.VideoFrame | None") -> None:
        """Refuse a frame that is not the one asked for: the stream ended before it, or the table was wrong."""
        late = float((target - (now.pts or 0)) * self.view.tick)
        if (self.index is not None and late) or (ahead is None and late > 2 / self.view.fps):
            raise self.view.ends(index, self.view.at(now.pts or 0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldFrames:
    """Frames of a track that starts late: before its own there are `lead` times the first.

    seconds_before: how late it starts.
    """

    source: FrameSource
    lead: int
    seconds_before: float

    def pick(self, wanted: list[int]) -> Iterator[Picture]:
        """See `FrameSource`."""
        own = [max(0, index - self.lead) for index in wanted]
        pictures = self.source.pick(sorted(set(own)))
        last, picture = -1, None
        for index in own:
            if index != last:
                last, picture = index, next(pictures)
            assert picture is not None
            yield picture

    def seconds(self, wanted: list[int]) -> Float[np.ndarray, " wanted"]:
        """See `FrameSource`."""
        held = [index * self.seconds_before / self.lead for index in wanted if index < self.lead]
        own = [index - self.lead for index in wanted if index >= self.lead]
        return np.concatenate([np.array(held, np.float64), self.source.seconds(own) if own else np.empty(0)])


def nominal(frame: int, first: int, fps: float, tick: Fraction) -> int:
    """The middle of the time that a frame of a constant-rate track is shown, in ticks."""
    return first + int((frame + 0.5) / fps / tick)


def upright(
    picture: UInt8[np.ndarray, "rows columns 3"], matrix: tuple[int, int, int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    """Turn and mirror a picture by multiples of 90 degrees, as the 2 x 2 part of a display matrix says.

    The matrix (a, b, c, d) sends column x and row y to column a x + c y and row b x + d y.
    """
    a, b, c, d = matrix
    if abs(b) > abs(a):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def display_matrix(frame: "av.VideoFrame") -> tuple[int, int, int, int]:
    """The 2 x 2 part of a frame's display matrix; the identity where it has none."""
    data = _side_data(frame).get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    return a, b, c, d


def _side_data(frame: "av.VideoFrame") -> Any:
    """What is said of a frame beside its pixels, as far as PyAV has a name for it.

    PyAV before 19 raises for all of it where FFmpeg knows one kind more than PyAV, such as EXIF. A filter of FFmpeg's
    then takes that kind away.
    """
    for _ in range(MOST_UNKNOWN):
        try:
            return frame.side_data
        except ValueError as error:
            kind = re.match(r"\d+", str(error))
            if kind is None:
                raise
            frame = _without(frame, kind[0])
    return {}


def _without(frame: "av.VideoFrame", kind: str) -> "av.VideoFrame":
    """The frame without side data of a kind, named by its number in FFmpeg."""
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
    begun = False
    try:
        for packet in packets(container, stream):
            try:
                for frame in packet.decode():
                    begun = True
                    yield frame
            except av.error.FFmpegError:
                if begun:
                    return
    except av.error.FFmpegError:
        return
