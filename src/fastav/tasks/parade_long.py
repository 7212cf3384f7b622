"""The parade in clips of 32 s."""

from fastav.parade import LENGTHS
from fastav.tasks.parade import ParadeTask


class ParadeLongTask(ParadeTask):
    """As `ParadeTask`, with three to five things and as many sounds in 32 s."""

    name = "parade-long"
    seconds = LENGTHS[1]
