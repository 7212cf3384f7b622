"""A scene in memory against the video file that is written of it."""

from collections.abc import Sequence

import numpy as np

from fastav.media import Clip


def written(memory: Clip, path, waveform: np.ndarray, rate: int, which: Sequence[int]) -> tuple[float, np.ndarray]:
    """The mean difference of these frames in a file from those in memory, and the file's sound.

    Checks that the file has as many frames, and sound that is as long but for what AAC adds.
    """
    file = Clip.open(path)
    assert memory.video is not None
    assert file.video is not None
    assert file.audio is not None
    assert file.video.frames == memory.video.frames
    sound = file.audio.read(rate)
    assert abs(len(sound) - len(waveform)) < 2100
    return float(np.abs(file.video.read(which).astype(float) - memory.video.read(which)).mean()), sound
