"""Text for numbers, lists and objects."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any


def plural(n: int, noun: str) -> str:
    """A count with its noun: `1 token`, `2,216 tokens`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def join_or(names: Sequence[str]) -> str:
    """A list of names in English: `one`, `one or two`, `one, two or three`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def summary_repr(instance: Any, *fields_shown: str, approximate: str = "") -> str:
    """A repr with the given fields of a dataclass; numbers are rounded to 3 places.

    approximate: a field that is shown first, as an approximate number.
    """
    values = {name: getattr(instance, name) for name in fields_shown}
    parts = [f"{name}={round(value, 3) if isinstance(value, float) else value!r}" for name, value in values.items()]
    head = [f"about {getattr(instance, approximate)} {approximate}"] if approximate else []
    return f"{type(instance).__name__}({', '.join([*head, *parts])})"


def brief_repr(instance: Any, *positional: str) -> str:
    """A repr that constructs an equal dataclass; fields with their default values are left out.

    positional: leading fields that are written without their names.
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
