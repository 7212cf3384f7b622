"""The questions of clients, about clips with sound, sound alone and text, of mixed lengths: the same every time."""

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

from fastav.adapter import ModelAdapter
from fastav.layout import Layout, Modality
from fastav.media import Clip
from fastav.request import Request, Use

FPS, RATE, WIDTH, HEIGHT, BLOCK = 2, 16_000, 448, 224, 28  # two frames are 128 tokens of Qwen


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """The subject of a question.  seconds: length of the clip; 0 for text."""

    name: str
    seconds: int = 0
    video: bool = False
    audio: bool = False


def _clip(seconds: int) -> Kind:
    return Kind(name=f"clip of {seconds} s", seconds=seconds, video=True, audio=True)


MIXED = (  # in the order in which they are asked, over and over
    _clip(8),
    _clip(4),
    Kind(name="text"),
    _clip(12),
    Kind(name="sound of 20 s", seconds=20, audio=True),
    _clip(6),
    _clip(16),
    _clip(3),
)
SILENT = tuple(  # for models without an audio encoder
    Kind(name=f"silent clip of {seconds} s", seconds=seconds, video=True) if seconds else Kind(name="text")
    for seconds in (8, 4, 0, 12, 6, 16, 3)
)


@dataclass(frozen=True)
class Media:
    """A clip with random content."""

    kind: Kind

    @cached_property
    def data(self) -> bytes:
        """The file's bytes: an MP4 with lossless sound, or a WAV."""
        return encode(self.kind)

    @cached_property
    def part(self) -> dict[str, Any]:
        """The content part of an OpenAI chat message."""
        text = base64.b64encode(self.data).decode()
        if self.kind.video:
            return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{text}"}}
        return {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}


class QuestionSet:
    """All questions, by number.

    distinct: whether vLLM's caches take the media of every question for others, as if each were about its own clip.
    """

    def __init__(self, adapter: ModelAdapter, *, distinct: bool = False) -> None:
        self.adapter, self._distinct = adapter, distinct
        self.kinds = MIXED if adapter.supports_audio else SILENT
        self._media = {kind: Media(kind) for kind in self.kinds if kind.seconds}

    def kind(self, number: int) -> Kind:
        """The subject of the question with this number."""
        return self.kinds[number % len(self.kinds)]

    def body(self, number: int) -> dict[str, Any]:
        """The question as chat messages, and vLLM's extra parameters."""
        kind, text = self.kind(number), {"type": "text", "text": question(number)}
        own = {"uuid": f"clip-{number}"} if self._distinct else {}
        media = [self._media[kind].part | own] if kind.seconds else []
        extra = {"mm_processor_kwargs": {"use_audio_in_video": True}} if kind.video and kind.audio else {}
        return {"messages": [{"role": "user", "content": [*media, text]}], "extra_body": extra}

    def layout(self, processor: Any, number: int, folder: Path) -> Layout:
        """The prompt's tokens, as the engine transformers prepares the same file."""
        kind = self.kind(number)
        if not kind.seconds:
            turns = [{"role": "user", "content": [{"type": "text", "text": question(number)}]}]
            prompt = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            return Layout.of(Modality.TEXT, len(processor.tokenizer(prompt).input_ids))
        file = folder / f"{kind.name}.{'mp4' if kind.video else 'wav'}"
        file.write_bytes(self._media[kind].data)
        use = (Use.BOTH if kind.audio else Use.VIDEO) if kind.video else Use.AUDIO
        request = Request(clip=Clip.open(file), question=question(number), use=use)
        return self.adapter.prepare(processor, [request]).layouts[0]


def question(number: int) -> str:
    """The text of a question: each has its own number, so that no two prompts are equal, and all have one length."""
    return f"Question {number:05}: what happens here, and when?"


def encode(kind: Kind) -> bytes:
    """A clip with random content as a file, the same every time."""
    file = BytesIO()
    wave = _wave(kind.seconds)
    with av.open(file, "w", format="mp4" if kind.video else "wav") as container:
        picture: Any = container.add_stream("libx264", rate=FPS) if kind.video else None
        sound: Any = None
        if kind.audio:
            sound = container.add_stream("flac" if kind.video else "pcm_s16le", rate=RATE, layout="mono")
        if picture is not None:
            picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            picture.codec_context.thread_count = 1  # with several threads the bytes differ each time
        for number, frame in enumerate(_film(kind.seconds * FPS)):
            if picture is not None:
                container.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            if sound is not None:
                container.mux(sound.encode(_audio_frame(wave, number)))
        for stream in (picture, sound):
            if stream is not None:
                container.mux(stream.encode(None))
    return file.getvalue()


def _film(frames: int) -> UInt8[np.ndarray, "frames height width 3"]:
    """Blocks with random colours, of which some change from frame to frame."""
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (frames, HEIGHT // BLOCK, WIDTH // BLOCK, 3), dtype=np.uint8)
    for before, now in pairwise(blocks):
        still = draw.random(now.shape[:2]) < 0.7
        now[still] = before[still]
    return blocks.repeat(BLOCK, 1).repeat(BLOCK, 2)


def _wave(seconds: int) -> Int16[np.ndarray, " samples"]:
    """A rising tone in noise."""
    time = np.arange(seconds * RATE) / RATE
    wave: Float32[np.ndarray, " samples"] = np.sin(2 * np.pi * (200 * time + 5 * time**2)).astype(np.float32)
    noise = np.random.default_rng(0).standard_normal(len(time), np.float32)
    return ((0.3 * wave + 0.02 * noise) * 32_000).astype(np.int16)


def _audio_frame(wave: Int16[np.ndarray, " samples"], number: int) -> av.AudioFrame:
    """The sound during one video frame."""
    each = RATE // FPS
    frame = av.AudioFrame.from_ndarray(wave[None, number * each : (number + 1) * each], format="s16", layout="mono")
    frame.sample_rate, frame.pts = RATE, number * each
    return frame
