"""The parade in clips of 64 s."""

from fastav.parade import LENGTHS
from fastav.tasks.parade import ParadeTask


class ParadeMinuteTask(ParadeTask):
    """As `ParadeTask`, with three to five things and as many sounds in 64 s."""

    name = "parade-minute"
    seconds = LENGTHS[2]
