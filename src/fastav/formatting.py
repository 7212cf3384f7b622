"""Numbers and objects in words."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any


def plural(n: int, noun: str) -> str:
    """`1 token`, `2,216 tokens`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def join_or(names: Sequence[str]) -> str:
    """`one`, `one or two`, `one, two or three`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def summary_repr(instance: Any, *fields_shown: str, approximate: str = "") -> str:
    """A dataclass as a call, of the fields told; numbers to 3 places.

    about: the field told first, if it is not exact.
    """
    values = {name: getattr(instance, name) for name in fields_shown}
    parts = [f"{name}={round(value, 3) if isinstance(value, float) else value!r}" for name, value in values.items()]
    head = [f"about {getattr(instance, approximate)} {approximate}"] if approximate else []
    return f"{type(instance).__name__}({', '.join([*head, *parts])})"


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
