"""Numbers and objects in words."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any


def counted(n: int, noun: str) -> str:
    """`1 token`, `2,216 tokens`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def either(names: Sequence[str]) -> str:
    """`one`, `one or two`, `one, two or three`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def brief_repr(instance: Any, *positional: str) -> str:
    """A dataclass as a call that makes an equal one, without the fields that have their defaults.

    positional: the first fields, written without their names.
    """
    parts = []
    for field in fields(instance):
        value = getattr(instance, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name in positional:
            parts.append(repr(value))
        elif default is MISSING or value != default:
            parts.append(f"{field.name}={value!r}")
    return f"{type(instance).__name__}({', '.join(parts)})"
