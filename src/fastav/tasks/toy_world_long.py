"""The toy world in clips of 32 s that are still and silent most of the time."""

from fastav.tasks.toy_world import ToyWorldTask
from fastav.world import LONG_SECONDS


class ToyWorldLongTask(ToyWorldTask):
    """As `ToyWorldTask`, but with questions about the order of movement and beeps instead of rests. For `tiny-long`."""

    name = "toy-world-long"
    seconds = LONG_SECONDS
