"""Checks of methods' options, which come from JSON."""

from typing import Any

from fastav.errors import PlanError


def require_flag(name: str, value: Any) -> None:
    """Require true or false.  Raises: PlanError."""
    if not isinstance(value, bool):
        raise PlanError(f"{name} must be true or false, got {value!r}")


def require_integer(name: str, value: Any, minimum: int) -> None:
    """Require a whole number of at least `minimum`.  Raises: PlanError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise PlanError(f"{name} must be a whole number of at least {minimum}, got {value!r}")


def require_number(name: str, value: Any, minimum: float | int, maximum: float | int) -> None:
    """Require a number from `minimum` to `maximum`.  Raises: PlanError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise PlanError(f"{name} must be a number from {minimum:g} to {maximum:g}, got {value!r}")
