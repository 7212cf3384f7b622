"""From decoded video to pixels: which frames."""

import numpy as np
from jaxtyping import Int

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
