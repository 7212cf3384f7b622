"""`fastav bench`. `python -m fastav.bench` runs it without the rest of the command line."""

from fastav.bench.command import bench

__all__ = ["bench"]
