"""The report of a calibration: one HTML page that needs nothing else.

Takes matplotlib and jinja2 (the extra `report`); without them importing this raises an InstallationError.
"""

from fastav.report.page import page

__all__ = ["page"]
