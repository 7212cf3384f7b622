"""Resizing and normalisation of frames, for several model families."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

UNIT = (np.arange(256) * (1 / 255)).astype(np.float32)
"""The value in [0, 1] of each of a pixel's 256 levels: a table, computed in float64 as the original code does."""


def resize(
    frames: UInt8[np.ndarray, "frames height width 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "frames newheight newwidth 3"]:
    """The frames, resized to this height and width (bicubic); returned as they are if they have it already."""
    if frames.shape[1:3] == size:
        return frames
    height, width = size

    def resize_frame(frame: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor() as threads:
        return np.stack(list(threads.map(resize_frame, frames)))


def pixel_values(frames: UInt8[np.ndarray, "frames height width 3"], size: int) -> Float[Tensor, "frames 3 size size"]:
    """SigLIP's input: frames resized (bicubic, without keeping the aspect ratio), values in [-1, 1]."""
    values = (UNIT - np.float32(0.5)) / np.float32(0.5)
    return torch.from_numpy(values[resize(frames, (size, size))]).permute(0, 3, 1, 2).contiguous()
