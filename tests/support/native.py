"""The three families of our own with their tiny checkpoints, for tests that hold for each of them."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ProcessorMixin

from fastav.adapter import ModelAdapter
from fastav.media import Clip
from fastav.models import video_salmonn2, video_salmonn2_plus, videollama2
from fastav.request import Request, Use
from support.spectra import assert_within, whisper

REFERENCE = Path(__file__).parents[1] / "reference"
Weights = dict[str, torch.Tensor]
PIECE = 30 * 16_000  # samples of what Whisper encodes at once


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family's classes and its tiny checkpoint in the original's format.  base: the model without its head."""

    name: str
    adapter: ModelAdapter
    config_class: Any
    model_class: Any
    base_class: Any
    processor_class: Any
    tokenizer_files: tuple[str, ...] = ("tokenizer.json", "tokenizer_config.json")

    @property
    def tiny(self) -> Path:
        return REFERENCE / self.name

    def config(self) -> Any:
        return self.adapter.config(str(self.tiny))

    def model(self, folder: Path | None = None) -> Any:
        return self.load(folder)[0]

    def load(self, folder: Path | None = None) -> tuple[Any, Any]:
        return self.adapter.load(str(folder or self.tiny), dtype=torch.float32)

    def processor(self, **options: Any) -> Any:
        return self.processor_class.from_pretrained(self.tiny, **options)

    def with_tokenizer(self, folder: Path) -> Path:
        for name in self.tokenizer_files:
            shutil.copy(self.tiny / name, folder)
        return folder


VIDEOLLAMA2 = Family(
    name="videollama2",
    adapter=videollama2.VideoLlama2Adapter(),
    config_class=videollama2.VideoLlama2Config,
    model_class=videollama2.VideoLlama2ForConditionalGeneration,
    base_class=videollama2.VideoLlama2Model,
    processor_class=videollama2.VideoLlama2Processor,
    tokenizer_files=("vocab.json", "merges.txt", "tokenizer_config.json"),
)
VIDEO_SALMONN2 = Family(
    name="video_salmonn2",
    adapter=video_salmonn2.VideoSalmonn2Adapter(),
    config_class=video_salmonn2.VideoSalmonn2Config,
    model_class=video_salmonn2.VideoSalmonn2ForConditionalGeneration,
    base_class=video_salmonn2.VideoSalmonn2Model,
    processor_class=video_salmonn2.VideoSalmonn2Processor,
)
VIDEO_SALMONN2_PLUS = Family(
    name="video_salmonn2_plus",
    adapter=video_salmonn2_plus.VideoSalmonn2PlusAdapter(),
    config_class=video_salmonn2_plus.VideoSalmonn2PlusConfig,
    model_class=video_salmonn2_plus.VideoSalmonn2PlusForConditionalGeneration,
    base_class=video_salmonn2_plus.VideoSalmonn2PlusModel,
    processor_class=video_salmonn2_plus.VideoSalmonn2PlusProcessor,
)
FAMILIES = {family.name: family for family in (VIDEOLLAMA2, VIDEO_SALMONN2, VIDEO_SALMONN2_PLUS)}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES, scope="module")


# --- checkpoints


def variant(family: Family, folder: Path, change: Callable[[Weights], Weights] | None = None, **config: Any) -> Path:
    """A copy of the tiny checkpoint with other weights or another configuration, without the keys that are None."""
    folder = folder / "checkpoint"
    shutil.copytree(family.tiny, folder, ignore=shutil.ignore_patterns("*.npz", "*.mp4", "*.wav"))
    if change is not None:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text()) | config
    for key in [key for key, value in config.items() if value is None]:
        del written[key]
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def without(*parts: str) -> Callable[[Weights], Weights]:
    """Drop the weights whose names hold one of these."""
    return lambda weights: {name: value for name, value in weights.items() if not any(p in name for p in parts)}


def assert_same_weights(ours: torch.nn.Module, other: torch.nn.Module) -> None:
    left, right = ours.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


class OtherProcessor(ProcessorMixin):
    """Another model's."""

    def __init__(self) -> None: ...


# --- clips and requests


def clip(frames: Any = None, sound: Any = None, rate: int = 16_000) -> Clip:
    """A clip of 10 frames a second."""
    return Clip.from_arrays(frames=frames, fps=10.0, waveform=sound, sample_rate=None if sound is None else rate)


def requests(*clips: Clip, use: Use = Use.AUTO) -> list[Request]:
    """A question about each clip, of another length each."""
    return [Request(clip=one, question="What happens?" * (i + 1), use=use) for i, one in enumerate(clips)]


# --- prompts of several kinds

RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (2, 8, 56, 84, 3), dtype=np.uint8)
SOUND = RANDOM.uniform(-0.5, 0.5, 31 * 16_000).astype(np.float32)  # over 30 s: two of Whisper's pieces
Row = tuple[str, Any, int | None, float | None]  # question, frames, samples of sound, seconds
BOTH: Row = ("What moves?", FRAMES[0], 48_000, 3.0)
SILENT: Row = ("What colour is the square, if there is one?", FRAMES[1], None, 2.0)
ALONE: Row = ("Describe it.", None, 50_000, None)
TEXT: Row = ("Hello!", None, None, None)
LONG: Row = ("And what is heard at the end of all this?", FRAMES[1], 31 * 16_000, 31.0)
OTHER_SIZE: Row = ("And what is heard at the end?", FRAMES[1, :5, :, :56], 31 * 16_000, 31.0)
ROWS = {
    VIDEOLLAMA2.name: (BOTH, SILENT, ALONE, TEXT, LONG),
    VIDEO_SALMONN2.name: (BOTH, SILENT, ALONE, TEXT, LONG),
    VIDEO_SALMONN2_PLUS.name: (BOTH, SILENT, TEXT, OTHER_SIZE),
}
LENGTH = {VIDEO_SALMONN2.name: "video_seconds", VIDEO_SALMONN2_PLUS.name: "seconds"}  # how long a video lasts


def inputs_of(family: Family, processor: Any, *rows: Row) -> dict[str, Any]:
    """A model's inputs of a batch of rows."""
    lengths = {LENGTH[family.name]: [row[3] for row in rows]} if family.name in LENGTH else {}
    return dict(
        processor(
            [processor.prompt(q, video=v is not None, audio=a is not None) for q, v, a, _ in rows],
            videos=[row[1] for row in rows],
            audio=[None if row[2] is None else SOUND[: row[2]] for row in rows],
            **lengths,
        )
    )


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    ids = model.generate(**inputs, **({"do_sample": False, "max_new_tokens": 5} | options))
    return ids[:, inputs["input_ids"].shape[1] :]


# --- against the originals


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that the original computed."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def assert_close(ours: torch.Tensor, original: np.ndarray, tolerance: float) -> None:
    assert tuple(ours.shape) == original.shape
    assert np.abs(ours.numpy() - original).max() <= tolerance


def assert_same_samples(clip: Clip, original: np.ndarray) -> None:
    """The clip's sound is the original's: decoded samples may differ by 2, and in number by the encoder's padding."""
    sound = clip.require_audio().read(16_000)
    assert abs(len(sound) - len(original)) <= 2048
    assert abs(clip.require_audio().length(16_000) - len(original)) <= 2048
    shared = min(len(sound), len(original))
    assert np.percentile(np.abs(sound[:shared] - original[:shared]), 99) <= 2 / 32768


def assert_same_spectrograms(
    ours: torch.Tensor, original: np.ndarray, sound: np.ndarray, is_sound: torch.Tensor, bins: int
) -> None:
    """The original's spectrograms are what float32 may have made of the exact ones, which ours are, rounded once."""
    pieces = np.pad(sound, (0, len(ours) * PIECE - len(sound))).reshape(len(ours), PIECE)
    for piece, mel, theirs in zip(pieces, ours, original, strict=True):
        bounds = whisper(piece, bins)
        assert_within(theirs, bounds)
        assert np.abs(mel.numpy() - bounds.exact).max() <= 2**-23  # of numbers below 4
    assert int(is_sound.sum()) == -(-len(sound) // 160)


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[Any]:
    """The model with another implementation of attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
