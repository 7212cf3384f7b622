"""What clients ask: clips with sound, sound alone and text, of mixed lengths, the same ones every time."""

import base64
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Float32, Int16, UInt8

from fastav.adapter import ModelAdapter, Request, Use
from fastav.layout import Layout, Modality
from fastav.media import Clip

FPS, RATE, WIDTH, HEIGHT = 2, 16_000, 448, 224  # 128 tokens of Qwen's for every two frames


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a question is about.  seconds: of the clip."""

    name: str
    seconds: int = 0
    seen: bool = False
    heard: bool = False


def _clip(seconds: int) -> Kind:
    return Kind(name=f"clip of {seconds} s", seconds=seconds, seen=True, heard=True)


MIX = (  # what one client after another asks about, over and over
    _clip(8),
    _clip(4),
    Kind(name="text"),
    _clip(12),
    Kind(name="sound of 20 s", seconds=20, heard=True),
    _clip(6),
    _clip(16),
    _clip(3),
)
SILENT = tuple(  # for models that do not hear
    Kind(name=f"silent clip of {seconds} s", seconds=seconds, seen=True) if seconds else Kind(name="text")
    for seconds in (8, 4, 0, 12, 6, 16, 3)
)


@dataclass(frozen=True)
class Media:
    """A clip of random content."""

    kind: Kind

    @cached_property
    def data(self) -> bytes:
        """As a file: an MP4, whose sound loses nothing, or a WAV."""
        return encoded(self.kind)

    @property
    def part(self) -> dict[str, Any]:
        """As OpenAI's chat has it."""
        text = base64.b64encode(self.data).decode()
        if self.kind.seen:
            return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{text}"}}
        return {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}


class Asking:
    """All questions, by number."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self.kinds = MIX if adapter.hears else SILENT
        self._media = {kind: Media(kind) for kind in self.kinds if kind.seconds}

    def kind(self, number: int) -> Kind:
        """What the question of this number is about."""
        return self.kinds[number % len(self.kinds)]

    def body(self, number: int) -> dict[str, Any]:
        """The question as the chat's messages, and what vLLM is told beside them."""
        kind, text = self.kind(number), {"type": "text", "text": question(number)}
        media = [self._media[kind].part] if kind.seconds else []
        told = {"mm_processor_kwargs": {"use_audio_in_video": True}} if kind.seen and kind.heard else {}
        return {"messages": [{"role": "user", "content": [*media, text]}], "extra_body": told}

    def layout(self, processor: Any, number: int, folder: Path) -> Layout:
        """The prompt's tokens, as the engine transformers makes them of the same file."""
        kind = self.kind(number)
        if not kind.seconds:
            turns = [{"role": "user", "content": [{"type": "text", "text": question(number)}]}]
            shown = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            return Layout.of(Modality.TEXT, len(processor.tokenizer(shown).input_ids))
        file = folder / f"{kind.name}.{'mp4' if kind.seen else 'wav'}"
        file.write_bytes(self._media[kind].data)
        use = (Use.BOTH if kind.heard else Use.VIDEO) if kind.seen else Use.AUDIO
        (layout,) = self.adapter.prepare(
            processor, [Request(clip=Clip.open(file), question=question(number), use=use)]
        ).layouts
        return layout


def question(number: int) -> str:
    """Of a number of its own, so that no two prompts are alike, and as long as any other."""
    return f"Question {number:05}: what happens here, and when?"


def encoded(kind: Kind) -> bytes:
    """A clip of random content as a file, the same one every time."""
    file = BytesIO()
    wave = _wave(kind.seconds)
    with av.open(file, "w", format="mp4" if kind.seen else "wav") as container:
        picture: Any = container.add_stream("libx264", rate=FPS) if kind.seen else None
        sound: Any = None
        if kind.heard:
            sound = container.add_stream("flac" if kind.seen else "pcm_s16le", rate=RATE, layout="mono")
        if picture is not None:
            picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            picture.codec_context.thread_count = 1  # several threads write other bytes each time
        for number, frame in enumerate(_film(kind.seconds * FPS)):
            if picture is not None:
                container.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            if sound is not None:
                container.mux(sound.encode(_block(wave, number)))
        for stream in (picture, sound):
            if stream is not None:
                container.mux(stream.encode(None))
    return file.getvalue()


def _film(frames: int) -> UInt8[np.ndarray, "frames height width 3"]:
    """Blocks of random colours, some of which change from frame to frame."""
    draw = np.random.default_rng(0)
    side = 28
    blocks = draw.integers(0, 256, (frames, HEIGHT // side, WIDTH // side, 3), dtype=np.uint8)
    for before, now in pairwise(blocks):
        still = draw.random(now.shape[:2]) < 0.7
        now[still] = before[still]
    return blocks.repeat(side, 1).repeat(side, 2)


def _wave(seconds: int) -> Int16[np.ndarray, " samples"]:
    """A rising tone in noise."""
    time = np.arange(seconds * RATE) / RATE
    wave: Float32[np.ndarray, " samples"] = np.sin(2 * np.pi * (200 * time + 5 * time**2)).astype(np.float32)
    noise = np.random.default_rng(0).standard_normal(len(time), np.float32)
    return ((0.3 * wave + 0.02 * noise) * 32_000).astype(np.int16)


def _block(wave: Int16[np.ndarray, " samples"], number: int) -> av.AudioFrame:
    """The sound while a frame is shown."""
    each = RATE // FPS
    frame = av.AudioFrame.from_ndarray(wave[None, number * each : (number + 1) * each], format="s16", layout="mono")
    frame.sample_rate, frame.pts = RATE, number * each
    return frame
