"""Options of methods, checked: they come from JSON."""

from typing import Any

from fastav.errors import PlanError


def require_flag(name: str, value: Any) -> None:
    """Raises: PlanError if it is neither true nor false."""
    if not isinstance(value, bool):
        raise PlanError(f"{name} must be true or false, got {value!r}")


def require_whole(name: str, value: Any, least: int) -> None:
    """Raises: PlanError if it is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PlanError(f"{name} must be a whole number of at least {least}, got {value!r}")


def require_number(name: str, value: Any, least: float | int, most: float | int) -> None:
    """Raises: PlanError if it is no number from `least` to `most`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise PlanError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}")
