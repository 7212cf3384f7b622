"""From decoded video to pixels: which frames, and how they are scaled."""

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from fastav.models.video_salmonn2.scheme import Scheme


def sample_frames(frames: int, fps: float | int, scheme: Scheme | None = None) -> Int[np.ndarray, " sampled"]:
    """Which of a clip's frames the model sees: one a second, or as many as it may, evenly spaced from first to last.

    frames, fps: how many the clip has, in all and a second.

    Source: bytedance/video-SALMONN-2 (llava), halves rounded to even.
    """
    scheme = scheme or Scheme()
    step = max(round(fps / scheme.video_fps), 1)
    indices = np.arange(0, frames, step, dtype=np.int64)
    if len(indices) > scheme.max_frames:
        indices = np.linspace(0, frames - 1, scheme.max_frames).astype(np.int64)
    return indices


def pixel_values(frames: UInt8[np.ndarray, "frames height width 3"], size: int) -> Float[Tensor, "frames 3 size size"]:
    """Frames as SigLIP takes them: resized (bicubic, the aspect ratio is not kept), each value in [-1, 1]."""
    pictures = [np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)) for frame in frames]
    scaled = (np.stack(pictures) * (1 / 255)).astype(np.float32)
    return torch.from_numpy((scaled - np.float32(0.5)) / np.float32(0.5)).permute(0, 3, 1, 2).contiguous()
