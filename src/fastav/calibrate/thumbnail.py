"""Small previews of clips, for reports."""

from itertools import pairwise

import numpy as np
from PIL import Image

from fastav.calibrate.store import Preview
from fastav.layout import Modality
from fastav.media import Clip
from fastav.trace import Trace

MAX_FRAMES, WIDTH, WAVEFORM_BINS = 24, 160, 800
RATE = 16_000  # Hz


def make_preview(clip: Clip, trace: Trace) -> Preview:
    """The frames of a prompt, at most `MAX_FRAMES` and `WIDTH` pixels wide, and the outline of the waveform."""
    frames, moments = np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0)
    is_visual = np.isin(trace.layout.modality, (Modality.VIDEO, Modality.IMAGE))
    seconds = np.unique(trace.layout.second[is_visual])
    if clip.video is not None and len(seconds := seconds[np.isfinite(seconds)]):
        moments = seconds[np.unique(np.linspace(0, len(seconds) - 1, MAX_FRAMES).round().astype(int))].astype(float)
        index = np.clip((moments * clip.video.fps).astype(int), 0, clip.video.frames - 1)
        frames = np.stack([_resize(frame) for frame in clip.video.read(index)])
    return Preview(frames=frames, moments=moments, peaks=_waveform_outline(clip), duration=clip.duration)


def _resize(frame: np.ndarray) -> np.ndarray:
    height = max(1, round(WIDTH * frame.shape[0] / frame.shape[1]))
    return np.asarray(Image.fromarray(frame).resize((WIDTH, height), Image.Resampling.LANCZOS))


def _waveform_outline(clip: Clip) -> np.ndarray:
    if clip.audio is None:
        return np.zeros((2, 0), np.float32)
    sound = np.asarray(clip.audio.read(RATE))
    ends = np.linspace(0, len(sound), min(WAVEFORM_BINS, len(sound)) + 1).astype(int)
    bins = [sound[start:end] for start, end in pairwise(ends)]
    return np.array([[samples.min() for samples in bins], [samples.max() for samples in bins]], np.float32).reshape(
        2, -1
    )
