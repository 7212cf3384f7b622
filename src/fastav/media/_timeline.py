"""The times of a track's frames, in display order, without decoding."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from fastav.media._pyav import av

BACK_SECONDS = (0, 10, 100, 1000, 10_000, 100_000, 1_000_000)
"""How far before the end of a file to search for the last packet of a track."""

REORDER = 64
"""Packets to read beyond a frame, to find all that are displayed before it; codecs reorder by at most 16."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """The frames of a track in display order, and its keyframes; times are in ticks of the stream.

    pts: the display time of each frame.
    keys, key_rank: the display time of each keyframe, and the number of frames displayed before it.
    end: the end of the last frame.
    complete_until: no frame before this time is missing, even if packets are missing at the end.
    """

    pts: Int[np.ndarray, " frames"]
    keys: Int[np.ndarray, " keys"]
    key_rank: Int[np.ndarray, " keys"]
    end: int
    complete_until: int

    def complete_part(self) -> "Timeline":
        """The part of a truncated file in which no frame is missing."""
        return replace(self, pts=self.pts[self.pts <= self.complete_until], end=self.complete_until)

    def entries(self, frame: int) -> list[int]:
        """Keyframes to decode this frame from, nearest first; the others serve if a seek lands late."""
        nearest = self.nearest_key(frame)
        return [int(self.keys[max(0, nearest - back)]) for back in (0, 1, 4, 16)]

    def nearest_key(self, frame: int) -> int:
        """The last keyframe that is displayed no later than this frame."""
        return max(0, bisect_right(self.key_rank, frame) - 1)


def packets(container: "av.container.InputContainer", stream: "av.VideoStream") -> "Iterator[av.Packet]":
    """The packets of a track with display times.

    AVI has decoding times only, which are the display times if no frame is reordered. FFmpeg 8 invents wrong ones for
    H.264: those of the next frame.
    """
    in_order = container.format.name == "avi" and not stream.codec_context.has_b_frames
    for packet in container.demux(stream):
        if in_order and packet.dts is not None:
            packet.pts = packet.dts
        yield packet


def scan(container: "av.container.InputContainer", stream: "av.VideoStream") -> Timeline | None:
    """The timeline of a whole track from its packets; None if the packets do not tell the order of frames."""
    # AVI stores no display times, and with B-frames those that FFmpeg computes are wrong
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        return None
    displayed_packets = (
        p for p in packets(container, stream) if p.size and not p.is_corrupt and is_displayed(p, stream)
    )
    # packets are not stored, because together they have the whole file in memory
    facts = [(p.pts, p.dts or 0, p.duration or 0, p.is_keyframe, not p.is_discard) for p in displayed_packets]
    if not facts or not facts[0][3] or any(pts is None for pts, *_ in facts):
        return None
    times, decode_times, durations, is_key, displayed = (np.array(column) for column in zip(*facts, strict=True))
    if len(np.unique(times)) < len(times) or times.min() < times[0] or not displayed.any():
        return None
    pts, keys = np.sort(times[displayed]), np.sort(times[is_key])
    end = int((times + durations)[displayed].max())
    return Timeline(
        pts=pts, keys=keys, key_rank=np.searchsorted(pts, keys), end=end, complete_until=int(decode_times.max())
    )


def is_displayed(packet: "av.Packet", stream: "av.VideoStream") -> bool:
    """Whether a packet is displayed; VP8's alternative references are only decoded (RFC 6386, section 9.1)."""
    return stream.codec_context.name != "vp8" or bool(bytes(packet)[0] & 0x10)


def track_end(
    container: "av.container.InputContainer", stream: "av.stream.Stream", guide: "av.stream.Stream | None" = None
) -> int | None:
    """The end of the track in ticks, from its last packets; None if they cannot be reached.

    The search goes back from the end of the file, which can be much later than that of the track.
    guide: the stream whose index is used to seek, if `stream` has none.
    """
    length = (container.duration or 0) + (container.start_time or 0)
    for back in BACK_SECONDS:
        try:
            target = max(0, length - back * 1_000_000)
            if guide is None or guide.time_base is None:
                container.seek(target, backward=True)
            else:
                container.seek(int(target / 1_000_000 / guide.time_base), backward=True, stream=guide)
            ends = (p.pts + (p.duration or 0) for p in container.demux(stream) if p.pts is not None and p.size)
            end = max(ends, default=None)
        except av.error.FFmpegError:
            return None
        if end is not None or back * 1_000_000 > length:
            return end
    return None


def avi_timeline(container: "av.container.InputContainer", stream: "av.VideoStream") -> Timeline | None:
    """The timeline of an AVI from its index, which lists every frame; None if the index is not sufficient."""
    if container.format.name != "avi" or stream.codec_context.has_b_frames:
        return None
    entries = [entry for entry in stream.index_entries if entry.size]
    pts = np.array([entry.timestamp for entry in entries], np.int64)
    keys = np.array([entry.timestamp for entry in entries if entry.is_keyframe], np.int64)
    if not len(pts) or not len(keys) or (np.diff(pts) <= 0).any() or keys[0] != pts[0]:
        return None
    end = int(pts[-1]) + 1
    return Timeline(pts=pts, keys=keys, key_rank=np.searchsorted(pts, keys), end=end, complete_until=end)


def decode_from_key(container: "av.container.InputContainer", stream: "av.VideoStream") -> "Iterator[av.VideoFrame]":
    """Frames from the next keyframe on in display order, until the data end or cannot be decoded.

    Frames displayed before that keyframe are skipped, because they may need earlier frames.
    """
    start = None
    try:
        for packet in packets(container, stream):
            if start is None:
                if not packet.is_keyframe:
                    continue
                start = packet.pts
            yield from (f for f in packet.decode() if f.pts is not None and (start is None or f.pts >= start))
    except av.error.FFmpegError:
        return


def seek_and_decode(
    container: "av.container.InputContainer", stream: "av.VideoStream", entries: list[int], target: int
) -> "tuple[av.VideoFrame, Iterator[av.VideoFrame]] | None":
    """Seek to the first of `entries` (ticks) from which decoding starts no later than `target`.

    Returns the first frame and an iterator over the following ones; None if no entry works.
    """
    for entry in entries:
        try:
            container.seek(entry, backward=True, stream=stream)
        except av.error.FFmpegError:
            continue
        frames = decode_from_key(container, stream)
        first = next(frames, None)
        if first is not None and first.pts is not None and first.pts <= target:
            return first, frames
    return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleTable:
    """The sample table of an MP4 or MOV: every frame in decoding order, even if the file's data are truncated.

    times: decoding times of the keyframes, in ticks.
    n_before: for each keyframe, the number of displayed frames that are decoded before it.
    """

    times: Int[np.ndarray, " keys"]
    n_before: Int[np.ndarray, " keys"]
    frames: int

    @classmethod
    def of(cls, container: "av.container.InputContainer", stream: "av.VideoStream") -> "SampleTable | None":
        """The table; None for other formats and for fragmented MP4s, which have none."""
        if "mp4" not in container.format.name or not stream.frames:
            return None
        entries = list(stream.index_entries)
        keys = np.array([e.is_keyframe for e in entries])
        displayed = np.array([not e.is_discard for e in entries])
        times = np.array([e.timestamp for e in entries], np.int64)
        n_before = np.cumsum(displayed) - displayed
        return cls(times=times[keys], n_before=n_before[keys].astype(np.int64), frames=int(displayed.sum()))

    def pts_of(self, container: "av.container.InputContainer", stream: "av.VideoStream", frame: int) -> int | None:
        """The display time of a frame in ticks, read from the packets after its keyframe.

        A frame decoded before a keyframe is also displayed before it, so only frames from there on need ordering.
        """
        key = bisect_right(self.n_before, frame) - 1
        while key >= 0:
            rank = frame - int(self.n_before[key])
            first, times = self._window(container, stream, key, rank + REORDER)
            leading = sum(t < first for t in times)
            if rank >= leading:
                return times[rank] if rank < len(times) else None
            key -= 1
        return None

    def _window(
        self, container: "av.container.InputContainer", stream: "av.VideoStream", key: int, count: int
    ) -> tuple[int, list[int]]:
        container.seek(int(self.times[key]), backward=True, stream=stream)
        first, times = None, []
        for packet in container.demux(stream):
            if packet.pts is None or (packet.dts or 0) < self.times[key]:
                continue
            first = packet.pts if first is None else first
            if not packet.is_discard:
                times.append(packet.pts)
            if len(times) >= count:
                break
        return first or 0, sorted(times)
