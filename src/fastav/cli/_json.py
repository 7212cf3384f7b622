"""What `--json` prints."""

import json
from collections.abc import Mapping
from typing import Any

SCHEMA_VERSION = 1
"""Of what every command prints; it goes up when a key is renamed, leaves, or means something else."""


def print_json(report: Mapping[str, Any]) -> None:
    """Print one object, headed by its `schema_version`."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **report}, indent=2))
