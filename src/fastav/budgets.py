"""Budgets: how many tokens of a pool a step keeps, from the layout alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import astuple, dataclass, fields
from fractions import Fraction
from math import ceil
from typing import Any, ClassVar, cast

import numpy as np

from fastav.errors import PlanError
from fastav.formatting import brief_repr
from fastav.layout import Layout, Modality

_ROUNDING = 1e-9  # a product of floats this far above a whole number is that number


@dataclass(frozen=True, slots=True, repr=False)
class Budget(ABC):
    """How many tokens of a pool to keep: a share of the remaining ones, or a number that the layout gives."""

    key: ClassVar[str]

    def __repr__(self) -> str:
        return brief_repr(self, *(field.name for field in fields(self)))

    @abstractmethod
    def tokens(self, layout: Layout, pool: Collection[Modality], remaining: int) -> int:
        """Number of tokens to keep, of the `remaining` tokens of `pool`; it may exceed `remaining`."""

    def scaled(self, effort: float, layout: Layout, pool: Collection[Modality], remaining: int, entering: int) -> int:
        """Number of tokens to keep in a plan with a target, which scales its budgets by one effort.

        effort: in [0, 1]. At 0 all tokens stay, at 1/2 as many as `tokens` says, at 1 none; between, the share that
        stays is s ** (effort / (1 - effort)), where `tokens` keeps the share s of the prompt's tokens of the pool. A
        budget of 0 tokens stays 0. entering: tokens of the pool that enter the decoder, after all cuts before layer 0.
        """
        whole = layout.count(*pool)
        return _power(min(1.0, self.tokens(layout, pool, whole) / max(1, whole)), effort, whole)

    def argument(self) -> Any:
        """The budget's value in JSON: its field, the list of its fields, or true if it has none."""
        values = astuple(self)
        return True if not values else values[0] if len(values) == 1 else list(values)


@dataclass(frozen=True, slots=True, repr=False)
class Share(Budget):
    """A share of the remaining tokens, rounded up: dropping 20 % drops floor(0.2 n)."""

    share: float | int
    key: ClassVar[str] = "share"

    def __post_init__(self) -> None:
        if not (is_number(self.share) and 0 < self.share <= 1):
            raise PlanError(f"a share must be in (0, 1], got {self.share!r}", "to drop a whole modality keep 0 tokens")
        object.__setattr__(self, "share", float(self.share))

    def tokens(self, layout: Layout, pool: Collection[Modality], remaining: int) -> int:  # noqa: D102
        # use the decimal as written, not its binary approximation: 0.8 of 5 is 4
        return ceil(Fraction(repr(self.share)) * remaining)

    def scaled(  # noqa: D102
        self, effort: float, layout: Layout, pool: Collection[Modality], remaining: int, entering: int
    ) -> int:
        return _power(self.share, effort, remaining)


@dataclass(frozen=True, slots=True, repr=False)
class Between(Budget):
    """A share between two bounds, rounded up, of the tokens that enter the decoder, for plans with a target.

    low: the share at effort 1. high: the share at effort 0. Equal bounds are a share that the target does not change.
    In a cut before layer 0 it is a share of the prompt's tokens.
    """

    low: float | int
    high: float | int
    key: ClassVar[str] = "between"

    def __post_init__(self) -> None:
        if not (is_number(self.low) and is_number(self.high) and 0 <= self.low <= self.high <= 1):
            raise PlanError(f"bounds must be two shares, the lower first, got {self.low!r} and {self.high!r}")
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))

    def tokens(self, layout: Layout, pool: Collection[Modality], remaining: int) -> int:  # noqa: D102
        raise PlanError("a budget between bounds needs a plan with a target", 'e.g. "target": {"retention": 0.25}')

    def scaled(  # noqa: D102
        self, effort: float, layout: Layout, pool: Collection[Modality], remaining: int, entering: int
    ) -> int:
        return ceil((self.high + (self.low - self.high) * effort) * entering - _ROUNDING)


@dataclass(frozen=True, slots=True, repr=False)
class Tokens(Budget):
    """A maximum number of tokens."""

    number: int
    key: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        _require_count("a number of tokens", self.number, 0)

    def tokens(self, layout: Layout, pool: Collection[Modality], remaining: int) -> int:  # noqa: D102
        return self.number


@dataclass(frozen=True, slots=True, repr=False)
class Before(Budget):
    """The number of tokens before a position of the prompt (counted from 0, without batch padding)."""

    position: int
    key: ClassVar[str] = "before"

    def __post_init__(self) -> None:
        _require_count("a position", self.position, 0)

    def tokens(self, layout: Layout, pool: Collection[Modality], remaining: int) -> int:  # noqa: D102
        return int(np.isin(layout.modality[: self.position], list(pool)).sum())


@dataclass(frozen=True, slots=True, repr=False)
class Frames(Budget):
    """The number of tokens that belong to the first `frames` sampled frames."""

    frames: int
    key: ClassVar[str] = "frames"

    def __post_init__(self) -> None:
        _require_count("a number of frames", self.frames, 1)

    def tokens(self, layout: Layout, pool: Collection[Modality], remaining: int) -> int:  # noqa: D102
        in_frames = (layout.frame >= 0) & (layout.frame < self.frames)
        return int((np.isin(layout.modality, list(pool)) & in_frames).sum())


@dataclass(frozen=True, slots=True, repr=False)
class Unpadded(Budget):
    """The number of tokens that are not padding by construction; a target does not change it."""

    key: ClassVar[str] = "unpadded"

    def tokens(self, layout: Layout, pool: Collection[Modality], remaining: int) -> int:  # noqa: D102
        return int((np.isin(layout.modality, list(pool)) & ~layout.padding).sum())

    def scaled(  # noqa: D102
        self, effort: float, layout: Layout, pool: Collection[Modality], remaining: int, entering: int
    ) -> int:
        return self.tokens(layout, pool, remaining)


_BUDGETS: dict[str, type[Budget]] = {b.key: b for b in (Share, Between, Tokens, Before, Frames, Unpadded)}


def budget_of(pool: str, value: Any) -> Budget:
    """The budget that a JSON object describes: `{"share": 0.8}`.  pool: its name, for messages.  Raises: PlanError."""
    entries = list(cast("dict[str, Any]", value).items()) if isinstance(value, dict) else []
    if len(entries) != 1 or entries[0][0] not in _BUDGETS:
        raise PlanError(f"keep.{pool} must be one of {', '.join(_BUDGETS)}, got {value!r}", 'e.g. {"share": 0.8}')
    ((key, argument),) = entries
    kind = _BUDGETS[key]
    make = cast("Callable[..., Budget]", kind)
    try:
        return make(*_arguments(kind, argument))
    except PlanError as error:
        raise PlanError(f"keep.{pool}: {error.message}", error.hint) from None


def _arguments(kind: type[Budget], argument: Any) -> list[Any]:
    """A budget's fields from its value in JSON.  Raises: PlanError."""
    if not (n := len(fields(kind))):
        return []
    values = cast("list[Any]", argument) if n > 1 and isinstance(argument, list) else [argument]
    takes_shares = kind in (Share, Between)
    if len(values) != n or not all(is_number(value) and (takes_shares or isinstance(value, int)) for value in values):
        wanted = "a number" if takes_shares else "a whole number"
        raise PlanError(f"{kind.key} must be {wanted if n == 1 else f'a list of {n} numbers'}, got {argument!r}")
    return values


def is_number(value: Any) -> bool:
    """Whether a value is a number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _power(share: float, effort: float, tokens: int) -> int:
    """The number of tokens that remain of `tokens` at an effort, where at 1/2 a share of them remains."""
    if share in (0, 1) or effort == 1:
        return tokens if share == 1 else 0
    return ceil(share ** (effort / (1 - effort)) * tokens - _ROUNDING)


def _require_count(what: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PlanError(f"{what} must be a whole number of at least {least}, got {value!r}")
