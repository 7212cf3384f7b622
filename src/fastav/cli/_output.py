"""JSON output and output files of the commands."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastav.errors import FastAVError
from fastav.files import atomic_write

SCHEMA_VERSION = 1
"""The version of all `--json` output. It increases when a key is renamed, removed, or changes its meaning."""


def print_json(report: Mapping[str, Any]) -> None:
    """Print a report as one JSON object that starts with its `schema_version`."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **report}, indent=2))


def write_file(path: Path, content: str | bytes) -> None:
    """Write a complete file or none: the old content stays until the new content is on disk.  Raises: FastAVError."""
    try:
        with atomic_write(path) as part:
            part.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise FastAVError(f"cannot write {path.resolve()}: {error.strerror}", "nothing was written") from None


def require_folder(path: Path, option: str) -> None:
    """Check, before any work, that a file can be written there.  Raises: FastAVError."""
    if path.is_dir():
        raise FastAVError(f"{path} is a folder", f"{option} must be a file")
    if not path.parent.is_dir():
        raise FastAVError(f"the folder {path.parent} does not exist", f"create it, or give another {option}")
