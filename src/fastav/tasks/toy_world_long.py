"""The toy world in clips of 32 s, nearly all of which is still and silent."""

from fastav.tasks.toy_world import ToyWorldTask
from fastav.world import LONG_SECONDS


class ToyWorldLongTask(ToyWorldTask):
    """As `ToyWorldTask`; instead of rests it asks what comes first, the movement or the beeps. For `tiny-long`."""

    name = "toy-world-long"
    seconds = LONG_SECONDS
