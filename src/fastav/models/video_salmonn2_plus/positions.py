"""Where tokens lie on the three rotary axes: time, height, width. Host data, one unpadded row at a time.

There are two rules, because the authors train with one and their inference script ends up with another: it drops the
lengths and timestamps that the first one needs, so the model falls back to Qwen2.5-VL's rule for video alone.
"""

import numpy as np
from jaxtyping import Int

from fastav.errors import MediaError
from fastav.models.video_salmonn2_plus.scheme import TOKENS_PER_SECOND, Scheme

Grid = tuple[int, int, int]


def row_positions(
    ids: Int[np.ndarray, " tokens"], grid: Grid | None, step_seconds: float | None, scheme: Scheme
) -> Int[np.ndarray, "3 tokens"]:
    """Positions of a row by the rule that `scheme.positions` names.

    grid: tokens of the row's video along time, height and width; None if it has none.
    Raises: MediaError if the ids do not hold such a video, or if the rule needs `step_seconds` and it is unknown.
    """
    video = ids == scheme.video_token_id
    if grid is None:
        if video.any():
            raise MediaError("the prompt holds a video of unknown size", "pass video_grid_thw")
        return text_positions(len(ids))
    if int(video.sum()) != int(np.prod(grid)):
        raise MediaError(f"the prompt holds {int(video.sum())} video tokens, its grid has {' x '.join(map(str, grid))}")
    first = int(video.argmax())
    if scheme.positions == "script":
        return script_positions(len(ids), first, grid)
    if step_seconds is None:
        raise MediaError("positions='dataset' needs to know when frames are shown", "pass the processor's position_ids")
    return dataset_positions(video, ids == scheme.audio_token_id, first, grid, step_seconds)


def text_positions(tokens: int, start: int = 0) -> Int[np.ndarray, "3 tokens"]:
    """Text: the same position on all axes."""
    return np.tile(np.arange(start, start + tokens), (3, 1))


def script_positions(tokens: int, first: int, grid: Grid) -> Int[np.ndarray, "3 tokens"]:
    """Positions that the authors' inference script gets.

    As many tokens as the video has, from the first of them on, are taken for the video, at one second a step, though
    audio tokens stand among them; everything later, the last video tokens too, for text.
    first: index of the first video token.

    Source: bytedance/video-SALMONN-2 at 61faec0, inference.py with transformers 4.51.3.
    """
    steps, rows, columns = np.indices(grid).reshape(3, -1)
    video = first + np.stack([steps * TOKENS_PER_SECOND, rows, columns])
    after = text_positions(tokens - first - video.shape[1], int(video.max()) + 1)
    return np.concatenate([text_positions(first), video, after], axis=1)


def dataset_positions(
    video: np.ndarray, audio: np.ndarray, first: int, grid: Grid, step_seconds: float
) -> Int[np.ndarray, "3 tokens"]:
    """Positions that the model was trained with: video and audio each on the clip's own time.

    The text after it starts behind the latest time; a picture may be wider than that.
    video, audio: which tokens are. first: index of the first video token.

    Source: bytedance/video-SALMONN-2 at 61faec0, the dataset of its training.
    """
    positions = np.zeros((3, len(video)), np.int64)
    steps, rows, columns = np.indices(grid).reshape(3, -1)
    # in float32, as PyTorch multiplies whole numbers by a Python float
    times = np.floor(steps.astype(np.float32) * np.float32(step_seconds) * TOKENS_PER_SECOND).astype(np.int64)
    positions[:, video] = first + np.stack([times, rows, columns])
    sounds = np.arange(int(audio.sum()))
    positions[:, audio] = first + np.stack([sounds, 0 * sounds, sounds])
    end = int(np.flatnonzero(video | audio)[-1]) + 1
    positions[:, :first] = text_positions(first)
    positions[:, end:] = text_positions(len(video) - end, int(positions[0, first:end].max()) + 1)
    return positions
