"""Which frames are shown of a video that is shown as a few pictures."""

import numpy as np
import pytest

from fastav.models._frame_sampling import frame_indices


@pytest.mark.parametrize(
    ("frames", "seconds", "expected"), [(1, 0.04, [0]), (100, 10.0, list(range(5, 100, 10))), (2, 10.0, [0, 1])]
)
def test_frames_stand_in_the_middle_of_equal_parts(frames, seconds, expected):
    assert frame_indices(frames, seconds, max_frames=16) == expected


def test_no_more_frames_are_shown_than_the_most():
    indices = frame_indices(25 * 3600, 3600.0, max_frames=16)
    assert len(indices) == 16
    assert len(set(np.diff(indices))) == 1
