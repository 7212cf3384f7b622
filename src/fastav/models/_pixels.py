"""Scaling of frames that models share."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

UNIT = (np.arange(256) * (1 / 255)).astype(np.float32)
"""What each value of a pixel is in [0, 1]: computed in float64, as the originals do, and looked up."""


def resized(
    frames: UInt8[np.ndarray, "frames height width 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "frames newheight newwidth 3"]:
    """Frames of this height and width (bicubic); those that have it already are left alone."""
    if frames.shape[1:3] == size:
        return frames
    height, width = size

    def scaled(frame: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor() as threads:
        return np.stack(list(threads.map(scaled, frames)))


def pixel_values(frames: UInt8[np.ndarray, "frames height width 3"], size: int) -> Float[Tensor, "frames 3 size size"]:
    """Frames as SigLIP takes them: resized (bicubic, the aspect ratio is not kept), each value in [-1, 1]."""
    values = (UNIT - np.float32(0.5)) / np.float32(0.5)
    return torch.from_numpy(values[resized(frames, (size, size))]).permute(0, 3, 1, 2).contiguous()
