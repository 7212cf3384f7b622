"""A clip made small, to be drawn beside what a plan keeps of it."""

from itertools import pairwise

import numpy as np
from PIL import Image

from fastav.calibrate.store import Look
from fastav.layout import Modality
from fastav.media import Clip
from fastav.trace import Trace

PICTURES, WIDTH, PARTS = 24, 160, 800
RATE = 16_000  # Hz


def look_at(clip: Clip, trace: Trace) -> Look:
    """The frames that a prompt shows, `PICTURES` of them at most, `WIDTH` pixels wide, and the waveform's outline."""
    frames, moments = np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0)
    seen = np.isin(trace.layout.modality, (Modality.VIDEO, Modality.IMAGE))
    shown = np.unique(trace.layout.second[seen])
    if clip.video is not None and len(shown := shown[np.isfinite(shown)]):
        moments = shown[np.unique(np.linspace(0, len(shown) - 1, PICTURES).round().astype(int))].astype(float)
        index = np.clip((moments * clip.video.fps).astype(int), 0, clip.video.frames - 1)
        frames = np.stack([_small(frame) for frame in clip.video.read(index)])
    return Look(frames=frames, moments=moments, peaks=_peaks(clip), duration=clip.duration)


def _small(frame: np.ndarray) -> np.ndarray:
    height = max(1, round(WIDTH * frame.shape[0] / frame.shape[1]))
    return np.asarray(Image.fromarray(frame).resize((WIDTH, height), Image.Resampling.LANCZOS))


def _peaks(clip: Clip) -> np.ndarray:
    if clip.audio is None:
        return np.zeros((2, 0), np.float32)
    sound = np.asarray(clip.audio.read(RATE))
    ends = np.linspace(0, len(sound), min(PARTS, len(sound)) + 1).astype(int)
    parts = [sound[start:end] for start, end in pairwise(ends)]
    return np.array([[part.min() for part in parts], [part.max() for part in parts]], np.float32).reshape(2, -1)
