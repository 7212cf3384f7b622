"""Scaling of frames that models share."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor


def resized(
    frames: UInt8[np.ndarray, "frames height width 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "frames newheight newwidth 3"]:
    """Frames of this height and width (bicubic); those that have it already are left alone."""
    if frames.shape[1:3] == size:
        return frames
    height, width = size
    return np.stack(
        [np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)) for frame in frames]
    )


def pixel_values(frames: UInt8[np.ndarray, "frames height width 3"], size: int) -> Float[Tensor, "frames 3 size size"]:
    """Frames as SigLIP takes them: resized (bicubic, the aspect ratio is not kept), each value in [-1, 1]."""
    scaled = (resized(frames, (size, size)) * (1 / 255)).astype(np.float32)
    return torch.from_numpy((scaled - np.float32(0.5)) / np.float32(0.5)).permute(0, 3, 1, 2).contiguous()
