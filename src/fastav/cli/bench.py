"""`fastav bench`, which runs without the rest of the command line too: `python -m fastav.bench`."""

from fastav.bench.command import bench

__all__ = ["bench"]
