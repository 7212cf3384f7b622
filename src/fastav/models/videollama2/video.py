"""From decoded video to pixels: which frames, and how they are scaled."""

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastav.models import _pixels
from fastav.models.videollama2.scheme import MOST_FRAMES


def sample_frames(frames: int, count: int, most: int = MOST_FRAMES) -> Int[np.ndarray, " sampled"]:
    """Which of a clip's frames the model sees: the middles of `count` equal parts; repeated if there are fewer.

    frames: how many the clip has. most: of the sampled frames, so many are kept.

    Source: DAMO-NLP-SG/VideoLLaMA2 (branch audio_visual); halves round to even, as NumPy does.
    """
    part = (frames - 1) / count
    middles = part * (np.arange(count) + 0.5) + 1e-6
    return np.round(middles).astype(np.int64)[:most]


def pixel_values(
    frames: UInt8[np.ndarray, "frames height width 3"], size: int, count: int, most: int = MOST_FRAMES
) -> Float[Tensor, "sampled 3 size size"]:
    """Frames as SigLIP takes them: resized (bicubic, the aspect ratio is not kept), each value in [-1, 1].

    count: fewer frames are followed by black ones up to this many, as the original does for lists of frames.
    most: further ones are left out.
    """
    frames = frames[:most]
    black = np.zeros((max(0, count - len(frames)), *frames.shape[1:]), np.uint8)
    return _pixels.pixel_values(np.concatenate([frames, black]), size)
