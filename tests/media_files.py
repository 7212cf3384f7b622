"""Clips for tests, written with PyAV: every frame shows its own number, so the right frame can be told."""

import heapq
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float, UInt8

BITS = 16
SKIP_MANUAL = 1 << 29  # AV_CODEC_FLAG2_SKIP_MANUAL


def numbered(number: int, width: int = 128, height: int = 64) -> UInt8[np.ndarray, "height width 3"]:
    """A picture of `BITS` black or white bars that spell the number, in a frame that a codec can keep."""
    bits = (number >> np.arange(BITS)) & 1
    row = np.repeat(bits * 200 + 20, width // BITS).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(row[None, :, None], (height, width, 3)))


def number_of(picture: UInt8[np.ndarray, "height width 3"]) -> int:
    """The number that `numbered` wrote, read from the middle of each bar."""
    width = picture.shape[1] // BITS
    bars = picture[:, width // 2 :: width].mean((0, 2))
    return int(((bars > 120) << np.arange(BITS)).sum())


def numbers(pictures: UInt8[np.ndarray, "picked height width 3"]) -> list[int]:
    return [number_of(p) for p in pictures]


def tone(seconds: float, rate: int, channels: int = 1) -> Float[np.ndarray, "channels samples"]:
    """A rising tone, a different one in each channel, so that every second sounds its own."""
    time = np.arange(round(seconds * rate)) / rate
    pitch = np.array([[200.0 + 70 * c] for c in range(channels)])
    return (0.3 * np.sin(2 * np.pi * (pitch * time + 3 * time**2))).astype(np.float32)


def write_clip(
    path: Path,
    codec: str | None = "libx264",
    *,
    frames: int = 40,
    fps: int = 10,
    size: tuple[int, int] = (128, 64),
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    times: Sequence[float] | None = None,
    rotation: int | None = None,
    audio: str | None = None,
    sound: Float[np.ndarray, "channels samples"] | None = None,
    rate: int = 16_000,
    layout: str = "mono",
    picture: Callable[[int, int, int], UInt8[np.ndarray, "height width 3"]] = numbered,
) -> Path:
    """Write frames (by number, width and height) and/or sound; `times` (seconds) makes the frame rate vary."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        video = None
        if codec is not None:
            video = container.add_stream(codec, rate=fps, options=options or {})
            video.width, video.height, video.pix_fmt = *size, pixels
            if times is not None:
                video.codec_context.time_base = Fraction(1, 1000)
            if rotation is not None:
                video.set_display_rotation(rotation)
        speech = None if audio is None else container.add_stream(audio, rate=rate, layout=layout)
        packets = []
        if video is not None:
            packets.append(_pictures(video, (picture(i, *size) for i in range(frames)), times))
        if speech is not None and sound is not None:
            packets.append(_blocks(speech, sound, rate, layout))
        for packet in heapq.merge(*packets, key=lambda p: (p.dts or 0) * p.time_base):
            container.mux(packet)
    return path


def _pictures(stream, pictures: Iterable[np.ndarray], times: Sequence[float] | None) -> Iterator[av.Packet]:
    for i, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        if times is not None:
            frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _blocks(stream, sound: Float[np.ndarray, "channels samples"], rate: int, layout: str) -> Iterator[av.Packet]:
    convert = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
    for start in range(0, sound.shape[1], 4096):
        block = np.ascontiguousarray(sound[:, start : start + 4096].T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        for part in convert.resample(frame):
            yield from stream.encode(part)
    yield from stream.encode(None)


def with_cover(path: Path) -> Path:
    """Put a cover picture (an ID3 APIC frame) at the head of an MP3."""
    image = BytesIO()
    with av.open(image, "w", format="image2pipe") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    body = b"\0image/png\0\x03\0" + image.getvalue()
    tag = b"APIC" + struct.pack(">I", len(body)) + b"\0\0" + body
    size = bytes((len(tag) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\x03\0\0" + size + tag + path.read_bytes())
    return path


def decode_everything(path: Path) -> UInt8[np.ndarray, "frames height width 3"]:
    """Every frame, from the start, by PyAV alone."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def decode_mono(path: Path, rate: int) -> Float[np.ndarray, " samples"]:
    """The whole track as s16 / 32768, by PyAV alone."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)
    with av.open(str(path)) as container:
        frames = [r for f in _played(container) for r in resampler.resample(f)] + resampler.resample(None)
    return np.concatenate([f.to_ndarray()[0] for f in frames]).astype(np.float32) / 32768


def _played(container) -> Iterator[av.AudioFrame]:
    """Decoded sound. Of an MP4's, all but the encoder's start is played, as by FFmpeg up to 8."""
    if "mp4" not in container.format.name:
        yield from container.decode(audio=0)
        return
    container.streams.audio[0].codec_context.flags2 |= SKIP_MANUAL
    yield from (frame for frame in container.decode(audio=0) if frame.pts >= 0)
