"""The report of a calibration: one self-contained HTML page.

It needs matplotlib and jinja2 (the extra `report`); without them the import raises an InstallationError.
"""

from fastav.report.page import page

__all__ = ["page"]
