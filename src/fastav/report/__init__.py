"""Reports as self-contained HTML pages: of a calibration, and of a verification.

They need matplotlib and jinja2 (the extra `report`); without them the import raises an InstallationError.
"""

from fastav.report.losses import losses_page
from fastav.report.page import page

__all__ = ["losses_page", "page"]
