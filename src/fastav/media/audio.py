"""The audio track of a clip."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from jaxtyping import Float, Float32, Float64

from fastav.errors import UnreadableMedia
from fastav.formatting import summary_repr
from fastav.media._open import MAX_SCAN_SECONDS, check_bytes, declared_seconds, open_container, select_stream, tolerance
from fastav.media._pyav import av
from fastav.media._sound import (
    ArraySound,
    AudioTiming,
    FileSound,
    SoundSource,
    decode_sound,
    interleave,
    is_seekable,
    mono,
    mono_span,
    samples_of,
    seek_stream,
)
from fastav.media._source import Source
from fastav.media._timeline import track_end

Mono = Float32[np.ndarray, " samples"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class AudioTrack:
    """An audio track: its properties, which need no decoding, and its sound.

    samples: per channel, as the container declares; decoding can give slightly more because of encoder padding.
    sample_rate: in Hz. duration: in seconds. start: seconds from the start of the clip to the first sample.
    silence: seconds of silence that are inserted before the file's first sample and count as part of the track.
    """

    samples: int
    sample_rate: int
    channels: int
    duration: float
    source: SoundSource
    start: float = 0.0
    silence: float = 0.0

    def __repr__(self) -> str:
        known = ("sample_rate", "channels", "duration", "start")
        if isinstance(self.source, ArraySound):
            return summary_repr(self, "samples", *known)
        return summary_repr(self, *known, approximate="samples")

    def from_start(self) -> "AudioTrack":
        """The track from the start of the clip on, with silence before its own start."""
        lead = round(self.start * self.sample_rate)
        if lead <= 0:
            return self
        seconds = lead / self.sample_rate
        return replace(
            self,
            samples=self.samples + lead,
            duration=self.duration + seconds,
            start=0.0,
            silence=self.silence + seconds,
        )

    def read(self, sample_rate: int, spans: Sequence[tuple[int, int]] | None = None) -> Mono | list[Mono]:
        """Return the track, or spans of it, as mono in [-1, 1) at `sample_rate` Hz.

        The samples are those of `ffmpeg -ac 1 -ar <sample_rate> -f s16le`, divided by 32768: FFmpeg mixes the channels,
        resamples and rounds to 16 bits. A span is (start, end) in samples at `sample_rate` from the first sample;
        samples past the end of the data are left out. In tracks over 10 minutes only the spans are decoded. Their
        positions are exact to the sample, except in MKV, WebM and FLV with packets of different sizes, where they are
        exact to 1 ms. Formats whose times drift (raw AC-3, MPEG program streams) are decoded entirely.

        Raises: ValueError if a span is not 0 <= start <= end. UnreadableMedia if nothing decodes, or if the result
        takes over 4.3 GB.
        """
        n_samples = self.duration * sample_rate if spans is None else sum(end - start for start, end in spans)
        check_bytes(int(4 * n_samples), f"reading {n_samples / sample_rate:.0f} s of sound", "read spans of it instead")
        lead = round(self.silence * sample_rate)
        if spans is not None and self.duration > MAX_SCAN_SECONDS and self.source.seekable:
            return [self._span(sample_rate, lead, *_check_span(span)) for span in spans]
        check_bytes(int(4 * self.duration * sample_rate), f"reading {self.duration:.0f} s of sound", "make it shorter")
        samples = mono(self.source.frames(), sample_rate)
        if not len(samples):
            raise self._no_samples_error()
        if lead:
            samples = np.concatenate([np.zeros(lead, np.float32), samples])
        return samples if spans is None else [samples[slice(*_check_span(span))] for span in spans]

    def _span(self, rate: int, lead: int, start: int, end: int) -> Mono:
        """One span of a long track, with little extra decoding."""
        silence = np.zeros(max(0, min(end, lead) - start), np.float32)
        if end <= lead:
            return silence
        sound = mono_span(self.source, rate, max(0, start - lead), end - lead)
        return np.concatenate([silence, sound]) if len(silence) else sound

    def length(self, sample_rate: int) -> int:
        """The number of samples that `read(sample_rate)` returns: exact up to 10 minutes, else from the duration."""
        if self.duration > MAX_SCAN_SECONDS:
            return round(self.duration * sample_rate)
        return len(self.read(sample_rate))

    def native(
        self, channel: int | None = None, max_seconds: float | None = None
    ) -> Float64[np.ndarray, "channels samples"] | Float64[np.ndarray, " samples"]:
        """Return the first `max_seconds` of one channel, or of all, in [-1, 1] at the track's own rate.

        Nothing is mixed, resampled or rounded; 16-bit samples are divided by 32768, exactly.

        Raises: IndexError if there is no such channel. UnreadableMedia as for `read`.
        """
        if channel is not None and not 0 <= channel < self.channels:
            raise IndexError(f"channel {channel} is not in [0, {self.channels})")
        seconds = self.duration if max_seconds is None else min(max_seconds, self.duration)
        size = int(8 * self.channels * seconds * self.sample_rate)
        check_bytes(size, f"reading {seconds:.0f} s of sound at its own rate", "set max_seconds")
        limit = None if max_seconds is None else round(max_seconds * self.sample_rate)
        count = round(self.silence * self.sample_rate)
        parts = []
        for frame in interleave(self.source.frames()):
            parts.append(samples_of(frame) if channel is None else samples_of(frame)[channel])
            count += frame.samples
            if limit is not None and count >= limit:
                break
        if not parts:
            raise self._no_samples_error()
        if n_silent := round(self.silence * self.sample_rate):
            parts.insert(0, np.zeros((*parts[0].shape[:-1], n_silent)))
        return np.concatenate(parts, axis=-1)[..., :limit]

    def _no_samples_error(self) -> UnreadableMedia:
        return UnreadableMedia(f"the audio track of {self.source.name} holds no sample that decodes", "is it complete?")


def probe_audio(source: Source, stream_index: int) -> AudioTrack:
    """The audio track of a file.

    All packets are read to measure its duration, in a long file only those at the end; two packets are decoded. If no
    more than encoder padding is missing, the duration is the declared one.
    """
    with open_container(source) as container:
        stream = select_stream(_audio(container, stream_index))
        rate, channels = stream.sample_rate, stream.channels
        if not rate or not channels:
            raise UnreadableMedia(f"the audio track of {source.name} does not say its sample rate", "is it complete?")
        declared, seekable = declared_seconds(container, stream), is_seekable(container)
        timing = AudioTiming.of(decode_sound(container, stream))
        first = 0.0 if timing is None else timing.origin
        measured = _tail_seconds(container, stream, declared, first)
    if measured is None:
        with open_container(source) as container:
            measured = _packet_seconds(container, select_stream(_audio(container, stream_index)), first)
    duration = declared if declared is not None and abs(declared - measured) <= tolerance(declared) else measured
    return AudioTrack(
        samples=round(duration * rate),
        sample_rate=rate,
        channels=channels,
        duration=duration,
        source=FileSound(source=source, stream=stream_index, sample_rate=rate, seekable=seekable),
        start=first,  # on the container's clock, until the start of the clip is known
    )


def _audio(container: "av.container.InputContainer", index: int) -> "av.AudioStream":
    stream = container.streams[index]
    assert isinstance(stream, av.AudioStream)
    return stream


def _tail_seconds(
    container: "av.container.InputContainer", stream: "av.AudioStream", declared: float | None, first: float
) -> float | None:
    """The duration of a long track from its last packets; None for other tracks, and if times do not tell."""
    if declared is None or declared <= MAX_SCAN_SECONDS or not is_seekable(container):
        return None
    end = track_end(container, stream, seek_stream(container, stream))
    return None if end is None else max(0.0, float(end * (stream.time_base or 0)) - first)


def _packet_seconds(container: "av.container.InputContainer", stream: "av.AudioStream", first: float) -> float:
    """The duration of a track from all its packets."""
    tick = stream.time_base or Fraction(1)
    ticks, end = 0, None
    for packet in container.demux(stream):
        ticks += packet.duration or 0
        if packet.pts is not None:
            end = max(end or 0, packet.pts + (packet.duration or 0))
    # a track with gaps is longer than the sum of its packets; a track without times is as long as the sum
    return max(float(ticks * tick), 0.0 if end is None else float(end * tick) - first)


def audio_of_array(
    waveform: Float[np.ndarray, "channels samples"] | Float[np.ndarray, " samples"], sample_rate: int | None, name: str
) -> AudioTrack:
    """A track of sound in memory.  Raises: UnreadableMedia if it is empty or misshapen, or has no sample rate."""
    if sample_rate is None or sample_rate <= 0:
        raise UnreadableMedia(f"a waveform needs its sample rate in Hz, got {sample_rate}", "pass sample_rate=16000")
    if waveform.dtype.kind != "f" or waveform.ndim not in (1, 2) or not waveform.size:
        description = f"{waveform.dtype} {list(waveform.shape)}"
        raise UnreadableMedia(f"a waveform must be float [channels, samples], got {description}", "scale it to [-1, 1]")
    if not np.isfinite(waveform).all():
        raise UnreadableMedia("a waveform must be finite, and this one has NaN or infinite samples", "repair it first")
    channels, samples = (sound := np.atleast_2d(waveform)).shape
    source = ArraySound(name=name, waveform=sound, sample_rate=sample_rate)
    return AudioTrack(
        samples=samples, sample_rate=sample_rate, channels=channels, duration=samples / sample_rate, source=source
    )


def _check_span(span: tuple[int, int]) -> tuple[int, int]:
    start, end = span
    if not 0 <= start <= end:
        raise ValueError(f"a span must be 0 <= start <= end, got {span}")
    return start, end
