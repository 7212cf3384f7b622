"""Sources of sound, and its conversion to arrays."""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import gcd
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Float64, Num

from fastav.media._open import open_container, select_stream
from fastav.media._pyav import av
from fastav.media._source import Source

BLOCK = 65_536
"""Samples per frame of an array."""

SKIP_SAMPLES = "skip_samples"
"""Side data of a packet: the numbers of samples to drop at its start and end (AV_PKT_DATA_SKIP_SAMPLES)."""

SEEKABLE_FORMATS = frozenset(["mov", "matroska", "wav", "flac", "ogg", "avi", "mpegts", "flv", "aac", "mp3"])
"""Formats, by FFmpeg's first name, whose times determine positions in the sound. In others times drift, for example in
raw AC-3, where FFmpeg computes them from the bit rate."""

WARM_UP = 0.5
"""Seconds to decode and drop before a window, for decoders that depend on earlier packets."""

TIME_ROUNDING = 0.002
"""Maximum error of the difference of two times that are rounded to 1 ms, in seconds."""

MARGIN = 0.1
"""Extra seconds on both sides of a span, for the filter of the resampler."""


@runtime_checkable
class SoundSource(Protocol):
    """Decoded sound at the track's own rate."""

    @property
    def name(self) -> str:
        """The name of the clip for messages."""
        ...

    @property
    def sample_rate(self) -> int:
        """In Hz."""
        ...

    @property
    def seekable(self) -> bool:
        """Whether a shorter `window` takes less time."""
        ...

    def frames(self) -> "Iterator[av.AudioFrame]":
        """The whole track."""
        ...

    def window(self, first: int, stop: int) -> "Iterator[av.AudioFrame]":
        """The track from sample `first` to at least sample `stop`, or to the end of the data."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArraySound:
    """Sound in memory."""

    name: str
    waveform: Float[np.ndarray, "channels samples"]
    sample_rate: int
    seekable = True

    def frames(self) -> "Iterator[av.AudioFrame]":
        """See `SoundSource`."""
        return self.window(0, self.waveform.shape[1])

    def window(self, first: int, stop: int) -> "Iterator[av.AudioFrame]":
        """See `SoundSource`."""
        for start in range(first, min(stop, self.waveform.shape[1]), BLOCK):
            part = self.waveform[:, start : min(start + BLOCK, stop)].astype(np.float32)
            yield frame_of(part, "flt", f"{len(part)} channels", self.sample_rate)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FileSound:
    """Sound of one stream of a file.

    seekable: whether reading can start in the middle; otherwise everything before is decoded too.
    """

    source: Source
    stream: int
    sample_rate: int
    seekable: bool

    @property
    def name(self) -> str:
        """See `SoundSource`."""
        return self.source.name

    def frames(self) -> "Iterator[av.AudioFrame]":
        """See `SoundSource`."""
        with open_container(self.source) as container:
            yield from decode_sound(container, self._track(container))

    def window(self, first: int, stop: int) -> "Iterator[av.AudioFrame]":
        """See `SoundSource`."""
        with open_container(self.source) as container:
            stream = self._track(container)
            timing = AudioTiming.of(decode_sound(container, stream))
            if timing is None:
                return
            position, frames = self._enter(container, stream, timing, first)
            for frame in interleave(frames):
                begin, position = position, position + frame.samples
                if position > first:
                    yield drop_start(frame, max(0, first - begin))
                if position >= stop:
                    return

    def _track(self, container: "av.container.InputContainer") -> "av.AudioStream":
        stream = container.streams[self.stream]
        assert isinstance(stream, av.AudioStream)
        return select_stream(stream)

    def _enter(
        self, container: "av.container.InputContainer", stream: "av.AudioStream", timing: "AudioTiming", first: int
    ) -> tuple[int, Iterator["av.AudioFrame"]]:
        """Seek to before sample `first`. Returns the index of the first decoded sample, and the frames from there."""
        guide = seek_stream(container, stream)
        for back in (WARM_UP, 10, 60):
            target = timing.origin + first / self.sample_rate - back
            if target <= timing.origin or not self.seekable:
                break
            try:
                container.seek(int(target / (guide.time_base or 1)), backward=True, stream=guide)
            except av.error.FFmpegError:
                break
            frames = decode_sound(container, stream)
            head = next(frames, None)
            if head is not None and (begin := timing.sample_index(head, self.sample_rate)) <= first:
                return begin, chain([head], frames)
        return 0, self.frames()


def mono(frames: "Iterable[av.AudioFrame]", sample_rate: int) -> Float32[np.ndarray, " samples"]:
    """Mix, resample and round to 16 bits as FFmpeg does by default; values are in [-1, 1)."""
    parts = [samples_of(frame)[0].astype(np.float32) for frame in convert(frames, "s16", "mono", sample_rate)]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def mono_span(source: SoundSource, rate: int, start: int, end: int) -> Float32[np.ndarray, " samples"]:
    """Samples `start` to `end` of `mono(source.frames(), rate)`, with little extra decoding.

    The resampler starts at a sample that both rates share, so that its filter gets the same samples.
    """
    native = source.sample_rate
    common_rate = gcd(native, rate)
    block = max(0, int((start / rate - MARGIN) * common_rate))
    first, stop = block * (native // common_rate), int((end / rate + MARGIN) * native)
    skip = start - block * (rate // common_rate)
    return mono(source.window(first, stop), rate)[skip : skip + end - start]


def convert(
    frames: "Iterable[av.AudioFrame]", sample_format: str | None, layout: str | None, rate: int | None
) -> "Iterator[av.AudioFrame]":
    """Pass frames through FFmpeg's resampler, with a new one whenever the format of the stream changes."""
    resampler, last = None, None
    for frame in frames:
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is None or kind != last:
            if resampler is not None:
                yield from resampler.resample(None)
            # PyAV cannot export planar arrays of 8 channels and more, so all frames become packed
            resampler, last = av.AudioResampler(sample_format or frame.format.packed.name, layout, rate), kind
        yield from resampler.resample(frame)
    if resampler is not None:
        yield from resampler.resample(None)


def interleave(frames: "Iterable[av.AudioFrame]") -> "Iterator[av.AudioFrame]":
    """The same samples with interleaved channels."""
    return convert(frames, None, None, None)


def samples_of(frame: "av.AudioFrame") -> Float64[np.ndarray, "channels samples"]:
    """The samples of a packed frame in [-1, 1], for any sample type; exact."""
    samples = frame.to_ndarray().reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128
    full = 1.0 if samples.dtype.kind == "f" else 2.0 ** (8 * samples.dtype.itemsize - 1)
    return samples.astype(np.float64) / full


def drop_start(frame: "av.AudioFrame", skip: int) -> "av.AudioFrame":
    """A packed frame without its first `skip` samples."""
    if not skip:
        return frame
    samples = frame.to_ndarray().reshape(-1, frame.layout.nb_channels).T[:, skip:]
    return frame_of(samples, frame.format.name, frame.layout.name, frame.sample_rate)


def frame_of(
    samples: Num[np.ndarray, "channels samples"], packed_format: str, layout: str, rate: int
) -> "av.AudioFrame":
    """A packed frame with these samples."""
    interleaved = np.ascontiguousarray(samples.T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(interleaved, format=packed_format, layout=layout)
    frame.sample_rate = rate
    return frame


def decode_sound(container: "av.container.InputContainer", stream: "av.AudioStream") -> "Iterator[av.AudioFrame]":
    """Every frame from here on. Packets that do not decode are skipped, as in FFmpeg's own tools."""
    try:
        for packet in container.demux(stream):
            try:
                yield from _keep_end_padding(packet, container).decode()
            except av.error.FFmpegError:
                continue
    except av.error.FFmpegError:
        return


def _keep_end_padding(packet: "av.Packet", container: "av.container.InputContainer") -> "av.Packet":
    """The packet; in MP4 and MOV without the mark that drops samples at its end.

    FFmpeg 9 drops the samples of the last packet beyond the track's declared length, FFmpeg 8 and earlier keep them.
    The models were trained with these samples, and the inputs of their original code have them.
    """
    if "mp4" not in container.format.name or not packet.has_sidedata(SKIP_SAMPLES):
        return packet
    skipped = packet.get_sidedata(SKIP_SAMPLES)
    start, end = struct.unpack_from("<II", bytes(skipped))
    if end:
        skipped.update(struct.pack("<II", start, 0) + bytes(skipped)[8:])
        packet.set_sidedata(skipped)
    return packet


def seek_stream(
    container: "av.container.InputContainer", stream: "av.AudioStream"
) -> "av.AudioStream | av.VideoStream":
    """The stream whose index is used to seek sound: in Matroska only the video has one."""
    if "matroska" not in container.format.name:
        return stream
    return next((s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic), stream)


class AudioTiming(NamedTuple):
    """The timing of a track's frames.

    origin: the time of its first sample, on the container's clock. head: samples of its first frame, from which encoder
    padding may have been removed. step: samples of the second frame, and in most codecs of all later ones; 0 if there
    is none.
    """

    origin: float
    head: int
    step: int

    @classmethod
    def of(cls, frames: "Iterator[av.AudioFrame]") -> "AudioTiming | None":
        """From the first two frames of a track; None if it has none."""
        first, second = next(frames, None), next(frames, None)
        if first is None:
            return None
        if second is None or second.pts is None or not first.sample_rate:
            return cls(_seconds(first), first.samples, 0)
        # the time of the first frame is wrong if padding was removed, so the second frame's time is used
        return cls(_seconds(second) - first.samples / first.sample_rate, first.samples, second.samples)

    def sample_index(self, frame: "av.AudioFrame", rate: int) -> int:
        """The number of samples of the track before a frame.

        If all frames have one size, the result is exact also in containers that round times to 1 ms.
        """
        position = (_seconds(frame) - self.origin) * rate
        if frame.samples == self.step > 4 * TIME_ROUNDING * rate:
            snapped = self.head + round((position - self.head) / self.step) * self.step
            if abs(snapped - position) <= TIME_ROUNDING * rate:
                return snapped
        return round(position)


def is_seekable(container: "av.container.InputContainer") -> bool:
    """Whether the times of the container's packets determine positions in the sound."""
    return container.format.name.partition(",")[0] in SEEKABLE_FORMATS


def _seconds(frame: "av.AudioFrame") -> float:
    return float((frame.pts or 0) * (frame.time_base or 0))
