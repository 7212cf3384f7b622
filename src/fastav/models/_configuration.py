"""Checks that the configurations share."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastav.errors import CheckpointError


def refuse_other_kind(written: Mapping[str, Any], model_type: str) -> None:
    """Raise CheckpointError if a config.json as written is another model's."""
    kind = written.get("model_type") or model_type
    if kind != model_type:
        raise CheckpointError(f"this is the configuration of a {kind} model, not of {model_type}")


def from_fields(kind: Any, key: str, given: Mapping[str, Any]) -> Any:
    """The dataclass `kind` of what stands under this key of a configuration.  Raises: CheckpointError."""
    unknown = set(given) - {field.name for field in fields(kind)}
    if unknown:
        raise CheckpointError(f"{key} has unknown keys: {', '.join(sorted(unknown))}")
    return kind(**given)
