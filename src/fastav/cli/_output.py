"""What `--json` prints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastav.errors import FastAVError
from fastav.files import atomic_write

SCHEMA_VERSION = 1
"""Of what every command prints; it goes up when a key is renamed, leaves, or means something else."""


def print_json(report: Mapping[str, Any]) -> None:
    """Print one object, headed by its `schema_version`."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **report}, indent=2))


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file or none: what was there before stays until all is on disk.  Raises: FastAVError."""
    try:
        with atomic_write(path) as part:
            part.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise FastAVError(f"cannot write {path.resolve()}: {error.strerror}", "nothing was written") from None
