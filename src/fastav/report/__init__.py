"""The report of a calibration: one HTML page that needs nothing else.

Takes matplotlib and jinja2 (`fastav[report]`); without them importing this raises a CalibrationError that says so.
"""

from fastav.report.page import page

__all__ = ["page"]
