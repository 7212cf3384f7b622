"""Reports as self-contained HTML pages: of answers, of a calibration, and of a verification.

Those of calibrations and verifications need matplotlib and jinja2 (the extra `report`); without them their import
raises an InstallationError.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastav.report.answer import answer_report
    from fastav.report.calibration import page
    from fastav.report.inspection import to_json
    from fastav.report.losses import losses_page

_HOMES = {"answer_report": "answer", "losses_page": "losses", "page": "calibration", "to_json": "inspection"}

__all__ = ["answer_report", "losses_page", "page", "to_json"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastav.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastav.report.{_HOMES[name]}"), name)
