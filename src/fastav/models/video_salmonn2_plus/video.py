"""From decoded video to pixels: which frames, how they are scaled, and how they are cut into patches."""

from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from fastav.media import VideoTrack
from fastav.models._pixels import UNIT, resize
from fastav.models.video_salmonn2_plus.scheme import Scheme

GROUP = 32  # frames of a file that are scaled at once

Frames = UInt8[np.ndarray, "frames height width 3"]


def sample_frames(frames: int, count: int) -> Int[np.ndarray, " sampled"]:
    """Which of a clip's frames the model sees: evenly spaced from the first to the last; repeated if there are fewer.

    Source: bytedance/video-SALMONN-2 at 61faec0.
    """
    return np.linspace(0, frames - 1, count).astype(np.int64)


def read_frames(track: VideoTrack, indices: Int[np.ndarray, " sampled"], scheme: Scheme) -> Frames:
    """These frames of a track, scaled as the model takes them; never more than a few at their full size."""
    size = scheme.size(len(indices), track.height, track.width)
    frames = track.each(indices)
    groups = iter(lambda: list(islice(frames, GROUP)), [])
    return np.concatenate([resize(np.stack(group), size) for group in groups])


def patches(frames: Frames, scheme: Scheme) -> Float[Tensor, "patches values"]:
    """Scaled frames as patches, in the order that Qwen2.5-VL's tower takes them.

    Patches go by time, then by token (row, column), then within the token; values by channel, frame, row, column.
    A last frame without a partner is repeated. Frames' height and width must be multiples of a token's side.
    """
    size, merge, temporal = scheme.patch_size, scheme.merge, scheme.temporal
    missing = -len(frames) % temporal
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    count, height, width, _ = frames.shape
    rows, columns = height // (merge * size), width // (merge * size)
    split = frames.reshape(count // temporal, temporal, rows, merge, size, columns, merge, size, 3)
    # put in order as bytes, a quarter of what the values are
    values = UNIT[split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3, temporal * size * size)]
    values -= np.array(OPENAI_CLIP_MEAN, np.float32)[:, None]
    values /= np.array(OPENAI_CLIP_STD, np.float32)[:, None]
    return torch.from_numpy(values.reshape(len(values), -1))
