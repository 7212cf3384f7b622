"""Writing frames and sound to a video file."""

import heapq
from collections.abc import Iterator
from fractions import Fraction
from os import PathLike
from typing import Any

import av
import numpy as np
from jaxtyping import Float, UInt8

_BLOCK = 1024  # samples


def write_mp4(
    path: str | PathLike[str],
    frames: UInt8[np.ndarray, "frames height width 3"],
    fps: int,
    waveform: Float[np.ndarray, " samples"],
    sample_rate: int,
) -> None:
    """Write an MP4 file with H.264 (constant quality 20) and mono AAC.  waveform: in [-1, 1]."""
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=fps, options={"crf": "20"})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        audio: Any = container.add_stream("aac", rate=sample_rate, layout="mono")
        packets = (_pictures(video, frames), _blocks(audio, waveform, sample_rate))
        for packet in heapq.merge(*packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
            container.mux(packet)


def _pictures(stream: Any, frames: np.ndarray) -> Iterator[Any]:
    for frame in frames:
        yield from stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
    yield from stream.encode(None)


def _blocks(stream: Any, waveform: np.ndarray, sample_rate: int) -> Iterator[Any]:
    for start in range(0, len(waveform), _BLOCK):
        part = waveform[None, start : start + _BLOCK]
        block: Any = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
        block.sample_rate, block.pts, block.time_base = sample_rate, start, Fraction(1, sample_rate)
        yield from stream.encode(block)
    yield from stream.encode(None)
