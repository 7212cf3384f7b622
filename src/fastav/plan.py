"""A plan: entering which layers, by which method, how many tokens of what stay.

A plan is data. It needs neither torch nor weights, travels as JSON, and together with a `Layout` tells how many tokens
every layer will keep before anything runs.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from fractions import Fraction
from math import ceil
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastav.errors import PlanError, reason_of
from fastav.formatting import brief_repr
from fastav.layout import MEDIA, Layout, Modality
from fastav.registry import METHODS

Remaining = Mapping[frozenset[Modality], int]  # tokens still there, by groups of modalities whose split is known


class Budget(ABC):
    """How many tokens of a pool stay: a share of what is there, or a number read off the layout."""

    key: ClassVar[str]

    def __repr__(self) -> str:
        return brief_repr(self, *(field.name for field in fields(self)))  # pyright: ignore[reportArgumentType]

    @abstractmethod
    def tokens(self, layout: Layout, pool: Collection[Modality], there: int) -> int:
        """Tokens that stay, of the `there` tokens of `pool` that are still there (the result may exceed `there`)."""


@dataclass(frozen=True, slots=True, repr=False)
class Share(Budget):
    """This share of what is still there, rounded up: dropping 20 % drops floor(0.2 n)."""

    share: float | int
    key: ClassVar[str] = "share"

    def __post_init__(self) -> None:
        if not (_is_number(self.share) and 0 < self.share <= 1):
            raise PlanError(f"a share must be in (0, 1], got {self.share!r}", "to drop a whole modality keep 0 tokens")
        object.__setattr__(self, "share", float(self.share))

    def tokens(self, layout: Layout, pool: Collection[Modality], there: int) -> int:  # noqa: D102
        # the decimal that was written is meant, not its binary neighbour: 0.8 of 5 is 4
        return ceil(Fraction(repr(self.share)) * there)


@dataclass(frozen=True, slots=True, repr=False)
class Tokens(Budget):
    """At most this many tokens."""

    number: int
    key: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        _require_count("a number of tokens", self.number, 0)

    def tokens(self, layout: Layout, pool: Collection[Modality], there: int) -> int:  # noqa: D102
        return self.number


@dataclass(frozen=True, slots=True, repr=False)
class Before(Budget):
    """As many tokens as stand before this position of the prompt (counted from 0, without batch padding)."""

    position: int
    key: ClassVar[str] = "before"

    def __post_init__(self) -> None:
        _require_count("a position", self.position, 0)

    def tokens(self, layout: Layout, pool: Collection[Modality], there: int) -> int:  # noqa: D102
        return int(np.isin(layout.modality[: self.position], list(pool)).sum())


@dataclass(frozen=True, slots=True, repr=False)
class Frames(Budget):
    """As many tokens as belong to the first so many sampled frames."""

    frames: int
    key: ClassVar[str] = "frames"

    def __post_init__(self) -> None:
        _require_count("a number of frames", self.frames, 1)

    def tokens(self, layout: Layout, pool: Collection[Modality], there: int) -> int:  # noqa: D102
        early = (layout.frame >= 0) & (layout.frame < self.frames)
        return int((np.isin(layout.modality, list(pool)) & early).sum())


@dataclass(frozen=True, slots=True, repr=False)
class Unpadded(Budget):
    """As many tokens as are not padding by construction."""

    key: ClassVar[str] = "unpadded"

    def tokens(self, layout: Layout, pool: Collection[Modality], there: int) -> int:  # noqa: D102
        return int((np.isin(layout.modality, list(pool)) & ~layout.padding).sum())


_BUDGETS: dict[str, type[Budget]] = {b.key: b for b in (Share, Tokens, Before, Frames, Unpadded)}


class Pool(Enum):
    """The groups of modalities that a `Keep` can give a budget."""

    text = frozenset({Modality.TEXT})
    audio = frozenset({Modality.AUDIO})
    video = frozenset({Modality.VIDEO})
    image = frozenset({Modality.IMAGE})
    clip = frozenset({Modality.AUDIO, Modality.VIDEO})
    media = frozenset(MEDIA)
    all = frozenset(Modality)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How many tokens stay; what has no budget stays whole.

    `clip` is one budget for audio and video together, `media` one for audio, video and image, `all` one that includes
    text: their tokens compete.
    The last token of the prompt always stays: its logits are the answer.

    Raises: PlanError if a modality has two budgets.
    """

    text: Budget | None = None
    audio: Budget | None = None
    video: Budget | None = None
    image: Budget | None = None
    clip: Budget | None = None
    media: Budget | None = None
    all: Budget | None = None

    def __post_init__(self) -> None:
        pools = self.pools()
        if sum(len(pool) for pool in pools) > len(frozenset().union(*pools)):
            named = ", ".join(f.name for f in fields(self) if getattr(self, f.name) is not None)
            raise PlanError(f"keep names a modality twice: {named}", "give every modality one budget")

    def __repr__(self) -> str:
        return brief_repr(self)

    def pools(self) -> dict[frozenset[Modality], Budget]:
        """The budgets, by the modalities that share them."""
        return {pool.value: budget for pool in Pool if (budget := getattr(self, pool.name)) is not None}

    def counts(self, layout: Layout, there: Remaining) -> dict[frozenset[Modality], int]:
        """Tokens that stay of every pool, from the layout alone.

        there: number of tokens still there, by groups of modalities whose split is known.
        Raises: PlanError if an earlier step pooled modalities that this one tells apart.
        """
        counts = {}
        for pool, budget in self.pools().items():
            torn = [group for group in there if group & pool and not group <= pool]
            if torn:
                names = " + ".join(sorted(m.label for m in torn[0]))
                raise PlanError(
                    f"a step budgets part of {names}, which an earlier step pooled: how many are left is not known",
                    "use the same pool (clip, media, all), or put the step by modality first",
                )
            left = sum(n for group, n in there.items() if group <= pool)
            holds_last = len(layout) > 0 and Modality(layout.modality[-1]) in pool
            counts[pool] = min(left, max(int(holds_last), budget.tokens(layout, pool, left)))
        return counts

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: `{"audio": {"tokens": 10}}`."""
        return {
            f.name: {b.key: getattr(b, fields(b)[0].name) if fields(b) else True}  # pyright: ignore[reportArgumentType]
            for f in fields(self)
            if (b := getattr(self, f.name)) is not None
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Keep":
        """The inverse of `to_dict`.  Raises: PlanError."""
        _require_keys("keep", data, {f.name for f in fields(cls)})
        return cls(**{name: _budget(name, value) for name, value in data.items()})


_PLAN_KEYS = {"fastav_plan", "name", "steps"}
_MADE_FOR = ("model", "layers", "hidden")

_LAYERS = re.compile(
    r"(?P<first>[0-9]{1,6}|[0-9]{1,3}/[1-9][0-9]{0,2}|middle)"
    r"(?:\+(?P<more>[0-9]{1,6}))?(?P<range>\.\.(?P<last>[0-9]{1,6})?)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Entering these layers, score with this method and keep this many.

    layers: `"14"`, `"middle"` (half the depth), `"3/4"` (of the depth), `"middle+1"`, `"15..20"` (both included),
    `"middle+1.."` (to the end).
    method: a name in the registry of methods; options: its settings.
    cache_only: whether tokens go from the layer's KV cache alone, after it has run on all of them, scored by its own
    attention. That saves memory and decoding, not prefill, and no other layer notices.

    Raises: PlanError, UnknownName.
    """

    layers: str
    method: str
    keep: Keep
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    cache_only: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.layers, str) and _LAYERS.fullmatch(self.layers)):
            raise PlanError(
                f"cannot read layers {self.layers!r}", "write 14, middle, 3/4, middle+1, 15..20 or middle+1.."
            )
        if self.method not in METHODS:
            METHODS[self.method]  # raises with the nearest names
        if not self.keep.pools():
            raise PlanError("a step keeps everything", "give at least one budget, e.g. keep media a share of 0.8")
        if "name" in self.options:
            raise PlanError("a method has no option called 'name'")
        object.__setattr__(self, "options", dict(self.options))

    def __repr__(self) -> str:
        return brief_repr(self)

    def entering(self, depth: int) -> range:
        """The layers, of a decoder of this depth; none for what begins after the last one and is open.

        Raises: PlanError if it has no such layer.
        """
        match = _LAYERS.fullmatch(self.layers)
        assert match is not None
        part, _, whole = "1/2".partition("/") if match["first"] == "middle" else match["first"].partition("/")
        first = (depth * int(part) // int(whole) if whole else int(part)) + int(match["more"] or 0)
        last = first if match["range"] is None else depth - 1 if match["last"] is None else int(match["last"])
        if last >= depth or first > last + (match["range"] == ".."):
            raise PlanError(f"layers {self.layers!r} do not exist in a decoder of {depth} layers (0..{depth - 1})")
        return range(first, last + 1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        method = {"name": self.method, **self.options}
        data = {"layers": self.layers, "method": method, "keep": self.keep.to_dict()}
        return data | ({"cache_only": True} if self.cache_only else {})

    @classmethod
    def from_dict(cls, data: Any) -> "Step":
        """The inverse of `to_dict`.  Raises: PlanError, UnknownName."""
        _require_keys("step", data, {"layers", "method", "keep", "cache_only"})
        rest = {key: value for key, value in data.items() if key != "cache_only"}
        _require_keys("step", rest, {"layers", "method", "keep"}, all_of_them=True)
        if not isinstance(only := data.get("cache_only", False), bool):
            raise PlanError(f"a step's cache_only must be true or false, got {only!r}")
        if not isinstance(method := data["method"], dict) or not isinstance(method.get("name"), str):
            raise PlanError(f"a step's method must be an object with a name, got {method!r}")
        if not isinstance(data["layers"], str):
            raise PlanError(f"a step's layers must be a string, got {data['layers']!r}", 'e.g. "14"')
        options = {key: value for key, value in method.items() if key != "name"}
        keep = Keep.from_dict(data["keep"])
        return cls(layers=data["layers"], method=method["name"], options=options, keep=keep, cache_only=only)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One cut through one prompt: entering `layer` (or in its cache alone), `counts` tokens of each pool stay.

    there: what is then there in all, by groups of modalities whose split is known.
    """

    layer: int
    step: Step
    counts: Remaining
    there: Remaining

    @property
    def total(self) -> int:
        """Tokens that are then there."""
        return sum(self.there.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps, taken in the order of their layers; without any, nothing is pruned.

    origin: of a calibrated plan, what it was made for (`model`, `layers`, `hidden`: the adapter's name, the decoder's
    depth and width) and from what (anything that JSON holds). It then fits no other model.
    """

    steps: tuple[Step, ...] = ()
    name: str = ""
    origin: Mapping[str, Any] | None = field(default=None, hash=False)

    VERSION: ClassVar[int] = 1

    def __repr__(self) -> str:
        return brief_repr(self, "steps")

    def cuts(self, depth: int) -> tuple[tuple[int, Step], ...]:
        """Every (layer, step) that drops tokens in a decoder of this depth, in order.

        Raises: PlanError if a layer does not exist, or a step tells apart what an earlier one pooled.
        """
        cuts = self._of_layers(depth, cache_only=False)
        nothing = Layout.of(Modality.TEXT, 0)
        there = _whole(nothing)
        for _, step in cuts:
            there = _after(there, step.keep.counts(nothing, there))
        return tuple(cuts)

    def cache_cuts(self, depth: int) -> tuple[tuple[int, Step], ...]:
        """Every (layer, step) that drops tokens from a cache alone, in order.

        Raises: PlanError if a layer does not exist, has two of them, or a step tells apart what an earlier one pooled.
        """
        self.cache_schedule(Layout.of(Modality.TEXT, 0), depth)
        return tuple(self._of_layers(depth, cache_only=True))

    def _of_layers(self, depth: int, *, cache_only: bool) -> list[tuple[int, Step]]:
        if self.steps and not any(len(step.entering(depth)) for step in self.steps):
            named = ", ".join(repr(step.layers) for step in self.steps)
            raise PlanError(
                f"layers {named} begin after the last one of a decoder of {depth} layers: nothing is pruned"
            )
        steps = [step for step in self.steps if step.cache_only == cache_only]
        return sorted(((layer, step) for step in steps for layer in step.entering(depth)), key=lambda cut: cut[0])

    def schedule(self, layout: Layout, depth: int) -> tuple[Cut, ...]:
        """What stays of this prompt at every cut, known before anything runs.  Raises: PlanError."""
        there = _whole(layout)
        schedule = []
        for layer, step in self.cuts(depth):
            counts = step.keep.counts(layout, there)
            there = _after(there, counts)
            schedule.append(Cut(layer=layer, step=step, counts=counts, there=there))
        return tuple(schedule)

    def cache_schedule(self, layout: Layout, depth: int) -> tuple[Cut, ...]:
        """What stays in the caches of layers that drop tokens from theirs alone.  Raises: PlanError."""
        running, cuts = self.layers(layout, depth), self._of_layers(depth, cache_only=True)
        if len({layer for layer, _ in cuts}) < len(cuts):
            raise PlanError("two cache-only steps name the same layer", "give every layer one")
        schedule = []
        for layer, step in cuts:
            counts = step.keep.counts(layout, running[layer])
            schedule.append(Cut(layer=layer, step=step, counts=counts, there=_after(running[layer], counts)))
        return tuple(schedule)

    def cached(self, layout: Layout, depth: int) -> tuple[int, ...]:
        """Tokens of the prompt that every layer's cache holds.  Raises: PlanError."""
        held = list(self.tokens(layout, depth))
        for cut in self.cache_schedule(layout, depth):
            held[cut.layer] = cut.total
        return tuple(held)

    def layers(self, layout: Layout, depth: int) -> tuple[Remaining, ...]:
        """What every layer runs on, by groups of modalities whose split is known.  Raises: PlanError."""
        left = {cut.layer: cut.there for cut in self.schedule(layout, depth)}
        layers, now = [], _whole(layout)
        for layer in range(depth):
            now = left.get(layer, now)
            layers.append(now)
        return tuple(layers)

    def by_layer(self, layout: Layout, depth: int) -> list[dict[str, int]]:
        """The same by the groups' names; `media` and `all` where the scores will decide of which kind.

        Raises: PlanError.
        """
        return [{Pool(group).name: n for group, n in there.items() if n} for there in self.layers(layout, depth)]

    def tokens(self, layout: Layout, depth: int) -> tuple[int, ...]:
        """Tokens that every layer runs on.  Raises: PlanError."""
        return tuple(sum(there.values()) for there in self.layers(layout, depth))

    def require(self, model: str, layers: int, hidden: int) -> None:
        """Refuse a model that the plan was not made for.  Raises: PlanError."""
        made = (model, layers, hidden) if self.origin is None else tuple(self.origin[key] for key in _MADE_FOR)
        if made != (model, layers, hidden):
            raise PlanError(
                f"the plan was calibrated for {made[0]} with {made[1]} layers of width {made[2]}, "
                f"this is {model} with {layers} of width {hidden}",
                "calibrate for this model: fastav calibrate",
            )

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that differ when the steps differ; name and origin do not count."""
        steps = json.dumps([step.to_dict() for step in self.steps], sort_keys=True)
        return hashlib.sha256(steps.encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """The plan as JSON text."""
        data = {"fastav_plan": self.VERSION, "name": self.name, "steps": [step.to_dict() for step in self.steps]}
        data |= {} if self.origin is None else {"origin": dict(self.origin)}
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`.  Raises: PlanError, UnknownName."""
        try:
            data = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"a plan must be JSON: {reason_of(error)}") from None
        _require_keys("plan", data, {"fastav_plan", "name", "steps", "origin"})
        _require_keys("plan", {k: v for k, v in data.items() if k != "origin"}, _PLAN_KEYS, all_of_them=True)
        if (origin := data.get("origin")) is not None and not (
            isinstance(origin, dict)
            and isinstance(origin.get("model"), str)
            and all(isinstance(origin.get(key), int) for key in _MADE_FOR[1:])
        ):
            raise PlanError("a plan's origin must name model, layers and hidden", "leave it out, or calibrate anew")
        if data["fastav_plan"] != cls.VERSION or isinstance(data["fastav_plan"], bool):
            raise PlanError(f"plan version {data['fastav_plan']!r} is not {cls.VERSION}", "write the plan anew")
        if not isinstance(data["name"], str) or not isinstance(data["steps"], list):
            raise PlanError("a plan's name must be a string and its steps a list")
        return cls(tuple(Step.from_dict(step) for step in data["steps"]), data["name"], origin)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Plan":
        """The plan in a file.  Raises: PlanError, UnknownName."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"cannot read the plan {str(path)!r}: {getattr(error, 'strerror', None) or reason_of(error)}"
            ) from None
        except PlanError as error:
            raise type(error)(f"{path}: {error.message}", error.hint) from None


def _whole(layout: Layout) -> Remaining:
    return {frozenset({m}): layout.count(m) for m in Modality}


def _after(there: Remaining, counts: Remaining) -> Remaining:
    """What is there after a cut: each pool is one group from now on."""
    rest = {group: n for group, n in there.items() if not any(group <= pool for pool in counts)}
    return {**rest, **counts}


def _budget(pool: str, value: Any) -> Budget:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in _BUDGETS:
        raise PlanError(f"keep.{pool} must be one of {', '.join(_BUDGETS)}, got {value!r}", 'e.g. {"share": 0.8}')
    (key, argument), *_ = value.items()
    budget = _BUDGETS[key]
    if fields(budget) and not (_is_number(argument) and (budget is Share or isinstance(argument, int))):  # pyright: ignore
        kind = "a number" if budget is Share else "a whole number"
        raise PlanError(f"keep.{pool}: {key} must be {kind}, got {argument!r}")
    try:
        return budget(argument) if fields(budget) else budget()  # pyright: ignore
    except PlanError as error:
        raise PlanError(f"keep.{pool}: {error.message}", error.hint) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(data := dict(pairs)) < len(pairs):
        raise PlanError(f"a key stands twice among {', '.join(key for key, _ in pairs)}")
    return data


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_count(what: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PlanError(f"{what} must be a whole number of at least {least}, got {value!r}")


def _require_keys(what: str, data: Any, known: set[str], *, all_of_them: bool = False) -> None:
    if not isinstance(data, dict):
        raise PlanError(f"a {what} must be a JSON object, got {type(data).__name__}")
    if unknown := sorted(set(data) - known):
        raise PlanError(f"a {what} has no {', '.join(map(repr, unknown))}", f"known: {', '.join(sorted(known))}")
    if all_of_them and (missing := sorted(known - set(data))):
        raise PlanError(f"a {what} needs {', '.join(map(repr, missing))}")
