"""The audio track of a clip."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from jaxtyping import Float, Float32, Float64

from fastav.errors import UnreadableMedia
from fastav.media._open import WHOLE_SECONDS, check_bytes, only, opened, stated_seconds
from fastav.media._sound import ArraySound, FileSound, SoundSource, mono, mono_span, packed, samples_of

Mono = Float32[np.ndarray, " samples"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AudioTrack:
    """What is known of an audio track without decoding it, and how to read its sound.

    samples: how many per channel, as the container says; decoding may give a little more, from the encoder's padding.
    sample_rate: in Hz. duration: in seconds.
    """

    samples: int
    sample_rate: int
    channels: int
    duration: float
    source: SoundSource = field(repr=False)

    def read(self, sample_rate: int, spans: Sequence[tuple[int, int]] | None = None) -> Mono | list[Mono]:
        """Return the track, or spans of it, as mono in [-1, 1) at `sample_rate` Hz.

        The samples are those of `ffmpeg -ac 1 -ar <sample_rate> -f s16le`, divided by 32768: FFmpeg mixes the channels,
        resamples and rounds to 16 bits. A span is (start, end), counted in samples at `sample_rate` from the first
        sample; what lies past the end of the data is left out. In tracks over 10 minutes only the spans are decoded,
        placed as exactly as the container's times allow (MP4, MOV and WAV: to the sample; MKV and WebM: to 1 ms).

        Raises: ValueError if a span is not 0 <= start <= end. UnreadableMedia if nothing decodes, or if the result
        takes over 4.3 GB.
        """
        wanted = self.duration * sample_rate if spans is None else sum(end - start for start, end in spans)
        check_bytes(int(4 * wanted), f"reading {wanted / sample_rate:.0f} s of sound", "read spans of it instead")
        if spans is not None and self.duration > WHOLE_SECONDS:
            return [mono_span(self.source, sample_rate, *_checked(span)) for span in spans]
        whole = mono(self.source.frames(), sample_rate)
        if not len(whole):
            raise self._silent()
        return whole if spans is None else [whole[slice(*_checked(span))] for span in spans]

    def length(self, sample_rate: int) -> int:
        """How many samples `read(sample_rate)` gives: exact up to 10 minutes, else from the duration."""
        if self.duration > WHOLE_SECONDS:
            return round(self.duration * sample_rate)
        return len(self.read(sample_rate))

    def native(
        self, channel: int | None = None, max_seconds: float | None = None
    ) -> Float64[np.ndarray, "channels samples"] | Float64[np.ndarray, " samples"]:
        """Return the first `max_seconds` of one channel, or of all, in [-1, 1] at the track's own rate.

        Nothing is mixed, resampled or rounded: 16-bit samples are divided by 32768, exactly.

        Raises: IndexError if there is no such channel. UnreadableMedia as for `read`.
        """
        if channel is not None and not 0 <= channel < self.channels:
            raise IndexError(f"channel {channel} is not in [0, {self.channels})")
        seconds = self.duration if max_seconds is None else min(max_seconds, self.duration)
        size = int(8 * self.channels * seconds * self.sample_rate)
        check_bytes(size, f"reading {seconds:.0f} s of sound at its own rate", "set max_seconds")
        limit = None if max_seconds is None else round(max_seconds * self.sample_rate)
        parts, count = [], 0
        for frame in packed(self.source.frames()):
            parts.append(samples_of(frame) if channel is None else samples_of(frame)[channel])
            count += frame.samples
            if limit is not None and count >= limit:
                break
        if not parts:
            raise self._silent()
        return np.concatenate(parts, axis=-1)[..., :limit]

    def _silent(self) -> UnreadableMedia:
        return UnreadableMedia(f"the audio track of {self.source.name} holds no sample that decodes", "is it complete?")


def probe_audio(path: Path, stream_index: int) -> AudioTrack:
    """Find out what the track is, decoding nothing.

    Where the container states no duration, the packets are read to find it.
    """
    with opened(path) as container:
        stream = container.streams[stream_index]
        assert isinstance(stream, AudioStream)
        rate, channels = stream.sample_rate, stream.channels
        duration = stated_seconds(container, stream)
        if duration is None:
            duration = _seconds_of_packets(container, only(stream))
    source = FileSound(path=path, stream=stream_index, sample_rate=rate)
    return AudioTrack(
        samples=round(duration * rate), sample_rate=rate, channels=channels, duration=duration, source=source
    )


def audio_of_array(
    waveform: Float[np.ndarray, "channels samples"] | Float[np.ndarray, " samples"], sample_rate: int | None, name: str
) -> AudioTrack:
    """A track of sound in memory. Raises: UnreadableMedia if it is empty or misshapen, or has no sample rate."""
    if sample_rate is None or sample_rate <= 0:
        raise UnreadableMedia(f"a waveform needs its sample rate in Hz, got {sample_rate}", "pass sample_rate=16000")
    if waveform.dtype.kind != "f" or waveform.ndim not in (1, 2) or not waveform.size:
        found = f"{waveform.dtype} {list(waveform.shape)}"
        raise UnreadableMedia(f"a waveform must be float [channels, samples], got {found}", "scale it to [-1, 1]")
    channels, samples = (sound := np.atleast_2d(waveform)).shape
    source = ArraySound(name=name, waveform=sound, sample_rate=sample_rate)
    return AudioTrack(
        samples=samples, sample_rate=sample_rate, channels=channels, duration=samples / sample_rate, source=source
    )


def _seconds_of_packets(container: InputContainer, stream: AudioStream) -> float:
    ticks = sum(packet.duration or 0 for packet in container.demux(stream))
    return float(ticks * (stream.time_base or 0))


def _checked(span: tuple[int, int]) -> tuple[int, int]:
    start, end = span
    if not 0 <= start <= end:
        raise ValueError(f"a span must be 0 <= start <= end, got {span}")
    return start, end
