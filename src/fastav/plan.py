"""A plan: the layers at which tokens are dropped, the method that scores them, and how many are kept.

A plan is data. It needs neither torch nor weights, can be stored as JSON, and together with a `Layout` gives the number
of tokens of every layer before anything runs.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from math import ceil
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, cast

from fastav.budgets import Between, Budget, budget_of
from fastav.errors import PlanError, reason_of
from fastav.flops import DecoderShape
from fastav.formatting import brief_repr
from fastav.layout import MEDIA, Layout, Modality
from fastav.registry import METHODS
from fastav.target import Efforts, Remaining, Target, least_effort, modality_retention


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
    """How many tokens to keep of each modality; a modality without a budget keeps all of its tokens.

    `clip` is one budget for audio and video together, `media` one for audio, video and image, `all` one that includes
    text: tokens that share a budget compete for it.
    `total` is what the pools keep together: their own budgets then give only the proportions in which they share it,
    and a pool that would keep more than it has leaves the rest to the others.
    The last token of the prompt is always kept: its logits give the answer.

    Raises: PlanError if a modality has two budgets, or if `total` stands alone.
    """

    text: Budget | None = None
    audio: Budget | None = None
    video: Budget | None = None
    image: Budget | None = None
    clip: Budget | None = None
    media: Budget | None = None
    all: Budget | None = None
    total: Budget | None = None

    def __post_init__(self) -> None:
        pools = self.pools()
        if self.total is not None and not pools:
            raise PlanError("a total without budgets", "give the budgets of the modalities that share it")
        if sum(len(pool) for pool in pools) > len(frozenset[Modality]().union(*pools)):
            names = ", ".join(f.name for f in fields(self) if getattr(self, f.name) is not None)
            raise PlanError(f"keep names a modality twice: {names}", "give every modality one budget")

    def __repr__(self) -> str:
        return brief_repr(self)

    def pools(self) -> dict[frozenset[Modality], Budget]:
        """The budgets, by the modalities that share them."""
        return {pool.value: budget for pool in Pool if (budget := getattr(self, pool.name)) is not None}

    def counts(
        self,
        layout: Layout,
        remaining: Remaining,
        efforts: Efforts | None = None,
        entering: Remaining | None = None,
    ) -> dict[frozenset[Modality], int]:
        """The number of tokens to keep of every pool, from the layout alone.

        remaining: numbers of remaining tokens, by groups of modalities whose split is known. efforts: of the budgets of
        each modality, in a plan with a target. entering: numbers of tokens that enter the decoder (None: of the
        prompt).
        Raises: PlanError if an earlier step pooled modalities that this one separates.
        """
        pools = self.pools()
        for pool in pools:
            split = [group for group in remaining if group & pool and not group <= pool]
            if split:
                names = " + ".join(sorted(m.label for m in split[0]))
                raise PlanError(
                    f"a step budgets part of {names}, which an earlier step pooled: how many remain of it is unknown",
                    "use the same pool (clip, media, all), or put the step by modality first",
                )
        sizes = {pool: _within(remaining, pool) for pool in pools}
        entering = _token_counts(layout) if entering is None else entering

        def tokens(budget: Budget, pool: frozenset[Modality], size: int) -> int:
            if efforts is None or (effort := efforts.get(next(iter(pool)))) is None:
                return budget.tokens(layout, pool, size)
            return budget.scaled(effort, layout, pool, size, _within(entering, pool))

        kept = {pool: tokens(budget, pool, sizes[pool]) for pool, budget in pools.items()}
        if self.total is not None:
            together = frozenset[Modality]().union(*pools)
            kept = _shared_out(tokens(self.total, together, sum(sizes.values())), kept, sizes)
        last = {Modality(m) for m in layout.modality[-1:]}
        return {pool: min(sizes[pool], max(int(last <= pool and bool(last)), n)) for pool, n in kept.items()}

    def to_dict(self) -> dict[str, Any]:
        """The budgets as a JSON object: `{"audio": {"tokens": 10}}`."""
        return {f.name: {b.key: b.argument()} for f in fields(self) if (b := getattr(self, f.name)) is not None}

    @classmethod
    def from_dict(cls, data: Any) -> "Keep":
        """The inverse of `to_dict`.  Raises: PlanError."""
        budgets = _json_object("keep", data, optional={f.name for f in fields(cls)})
        return cls(**{name: budget_of(name, value) for name, value in budgets.items()})


def _within(remaining: Remaining, pool: frozenset[Modality]) -> int:
    """The number of tokens in the groups of a pool."""
    return sum(n for group, n in remaining.items() if group <= pool)


def _shared_out(
    total: int, weights: Mapping[frozenset[Modality], int], sizes: Mapping[frozenset[Modality], int]
) -> dict[frozenset[Modality], int]:
    """A total, shared out among pools in proportion to weights, each up to its size and rounded up."""
    counts = dict.fromkeys(weights, 0)
    left: dict[frozenset[Modality], int] = {pool: n for pool, n in weights.items() if n}
    while left:
        scale = Fraction(max(0, total - sum(counts.values())), sum(left.values()))
        full = {pool: sizes[pool] for pool, n in left.items() if scale * n >= sizes[pool]}
        if not full:
            return counts | {pool: ceil(scale * n) for pool, n in left.items()}
        counts |= full
        left = {pool: n for pool, n in left.items() if pool not in full}
    return counts


_ORIGIN_KEYS = ("model", "layers", "hidden")
_STEP_FLAGS = ("cache_only", "earlier_caches")

_LAYERS = re.compile(
    r"(?P<first>[0-9]{1,6}|[0-9]{1,3}/[1-9][0-9]{0,2}|middle)"
    r"(?:\+(?P<more>[0-9]{1,6}))?(?P<range>\.\.(?P<last>[0-9]{1,6})?)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A method and budgets that apply before each of some layers.

    layers: `"14"`, `"middle"` (half the depth), `"3/4"` (of the depth), `"middle+1"`, `"15..20"` (both included),
    `"middle+1.."` (to the end).
    method: a name in the registry of methods. options: its settings.
    cache_only: drop tokens only from the layer's KV cache, after the layer has run on all of them, scored by its own
    attention. This saves memory and decoding time but no prefill, and changes no other layer.
    earlier_caches: also reduce the KV caches of all earlier layers to the tokens that the layer behind the cut runs on.
    The prefill stays as it is; decoding reads and stores less. Of several such cuts in a plan, the last one decides.

    Raises: PlanError, UnknownName.
    """

    layers: str
    method: str
    keep: Keep
    options: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
    cache_only: bool = False
    earlier_caches: bool = False

    def __post_init__(self) -> None:
        is_text = isinstance(self.layers, str)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not (is_text and _LAYERS.fullmatch(self.layers)):
            raise PlanError(
                f"cannot read layers {self.layers!r}", "write 14, middle, 3/4, middle+1, 15..20 or middle+1.."
            )
        if self.method not in METHODS:
            METHODS[self.method]  # raises with the nearest names
        if not self.keep.pools():
            raise PlanError("a step keeps everything", "give at least one budget, e.g. keep media a share of 0.8")
        if self.cache_only and self.earlier_caches:
            raise PlanError("a cache-only step changes no other layer, so it cannot cut earlier caches", "remove one")
        if "name" in self.options:
            raise PlanError("a method has no option called 'name'")
        object.__setattr__(self, "options", dict(self.options))

    def __repr__(self) -> str:
        return brief_repr(self)

    def layer_range(self, depth: int) -> range:
        """The layers of this step in a decoder of this depth; none for an open range that begins after the last one.

        Raises: PlanError if the decoder has no such layer.
        """
        match = _LAYERS.fullmatch(self.layers)
        assert match is not None
        start, _, divisor = "1/2".partition("/") if match["first"] == "middle" else match["first"].partition("/")
        first = (depth * int(start) // int(divisor) if divisor else int(start)) + int(match["more"] or 0)
        last = first if match["range"] is None else depth - 1 if match["last"] is None else int(match["last"])
        if last >= depth or first > last + (match["range"] == ".."):
            raise PlanError(f"layers {self.layers!r} do not exist in a decoder of {depth} layers (0..{depth - 1})")
        return range(first, last + 1)

    def to_dict(self) -> dict[str, Any]:
        """The step as a JSON object."""
        method = {"name": self.method, **self.options}
        data = {"layers": self.layers, "method": method, "keep": self.keep.to_dict()}
        return data | {name: True for name in _STEP_FLAGS if getattr(self, name)}

    @classmethod
    def from_dict(cls, data: Any) -> "Step":
        """The inverse of `to_dict`.  Raises: PlanError, UnknownName."""
        step = _json_object("step", data, required={"layers", "method", "keep"}, optional=set(_STEP_FLAGS))
        flags = {name: step.get(name, False) for name in _STEP_FLAGS}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise PlanError(f"a step's {name} must be true or false, got {value!r}")
        method = cast("dict[str, Any]", step["method"]) if isinstance(step["method"], dict) else {}
        if not isinstance(method.get("name"), str):
            raise PlanError(f"a step's method must be an object with a name, got {step['method']!r}")
        if not isinstance(step["layers"], str):
            raise PlanError(f"a step's layers must be a string, got {step['layers']!r}", 'e.g. "14"')
        options = {key: value for key, value in method.items() if key != "name"}
        keep = Keep.from_dict(step["keep"])
        return cls(layers=step["layers"], method=method["name"], options=options, keep=keep, **flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One cut of one prompt: before `layer`, or in its cache alone, `counts` tokens of each pool are kept.

    remaining: numbers of all tokens after the cut, by groups of modalities whose split is known.
    """

    layer: int
    step: Step
    counts: Remaining
    remaining: Remaining

    @property
    def total(self) -> int:
        """Number of tokens after the cut."""
        return sum(self.remaining.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps, applied in the order of their layers; a plan without steps prunes nothing.

    origin: for a calibrated plan, the model that it was made for (`model`, `layers`, `hidden`: the adapter's name, the
    decoder's depth and width) and its data (any JSON values). Such a plan fits no other model.
    target: what the prefill may cost in all. The steps then give the schedule's shape, and for every prompt one effort
    (one per modality, if the target is by modality) scales their budgets until the cost is the target, or as far below
    it as whole tokens leave it.

    Raises: PlanError if budgets have bounds but the plan no target, or if steps pool modalities that the target tells
    apart.
    """

    steps: tuple[Step, ...] = ()
    name: str = ""
    origin: Mapping[str, Any] | None = field(default=None, hash=False)
    target: Target | None = None

    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        budgets = [budget for step in self.steps for budget in (*step.keep.pools().values(), step.keep.total)]
        if self.target is None:
            if any(isinstance(budget, Between) for budget in budgets):
                raise PlanError(
                    "a budget between bounds needs a plan with a target", 'e.g. "target": {"retention": 0.25}'
                )
            return
        if not self.steps:
            raise PlanError("a plan without steps cannot meet a target", "choose a plan that prunes")
        if self.target.by_modality:
            self._check_modalities(self.target.by_modality)

    def _check_modalities(self, targeted: Collection[Modality]) -> None:
        """Refuse budgets that targets of single modalities cannot scale one by one."""
        pools = [pool for step in self.steps for pool in step.keep.pools()]
        if any(step.keep.total is not None for step in self.steps):
            raise PlanError("a total couples modalities, whose targets are solved one by one", "set one target for all")
        bounded = [pool for step in self.steps for pool, b in step.keep.pools().items() if isinstance(b, Between)]
        if any(not pool <= set(targeted) for pool in bounded):
            raise PlanError("a budget between bounds has no target", "give every modality with such a budget one")
        for modality in targeted:
            if frozenset({modality}) not in pools or any(modality in pool and len(pool) > 1 for pool in pools):
                raise PlanError(
                    f"a target for {modality.label} needs steps with a budget of its own for {modality.label}",
                    "choose another plan, or one target for all media",
                )

    def __repr__(self) -> str:
        return brief_repr(self, "steps")

    def retaining(self, retention: float | int | Mapping[str, float | int]) -> "Plan":
        """The plan with a target of mean retention; its name tells it.  Raises: PlanError."""
        return self.aiming_at(Target(retention=retention))

    def aiming_at(self, target: Target) -> "Plan":
        """The plan with this target; its name tells it.  Raises: PlanError."""
        base = self.name.partition("@")[0] if self.target is not None else self.name
        return replace(self, target=target, name=f"{base}@{target.suffix}")

    def for_decoder(self, shape: DecoderShape) -> "Plan":
        """The plan for a decoder of this shape, which targets of FLOPs and KV bytes need."""
        if self.target is None or self.target.retention is not None:
            return self
        return replace(self, target=replace(self.target, shape=shape))

    def cuts(self, depth: int) -> tuple[tuple[int, Step], ...]:
        """Every (layer, step) that drops tokens in a decoder of this depth, in order.

        Raises: PlanError if a layer does not exist, or a step separates modalities that an earlier one pooled.
        """
        cuts = self._layer_steps(depth, cache_only=False)
        _schedule(cuts, Layout.of(Modality.TEXT, 0), dict.fromkeys(Modality, 0.0))
        return tuple(cuts)

    def cache_cuts(self, depth: int) -> tuple[tuple[int, Step], ...]:
        """Every (layer, step) that drops tokens from a cache alone, in order.

        Raises: PlanError if a layer does not exist or has two such steps, or if a step separates modalities that an
        earlier one pooled.
        """
        self.cache_schedule(Layout.of(Modality.TEXT, 0), depth)
        return tuple(self._layer_steps(depth, cache_only=True))

    def earlier_caches_until(self, depth: int) -> int:
        """The layer before which every cache holds the tokens of this layer alone; 0 if no step cuts earlier caches.

        Raises: PlanError if no layer comes before such a step, or if a cache-only step names one that does.
        """
        layers = [layer for layer, step in self._layer_steps(depth, cache_only=False) if step.earlier_caches]
        until = max(layers, default=0)
        if layers and not until:
            raise PlanError("no layer comes before layer 0, so no earlier cache can be cut", "remove earlier_caches")
        if early := [layer for layer, _ in self._layer_steps(depth, cache_only=True) if layer < until]:
            raise PlanError(
                f"a cache-only step cuts the cache of layer {early[0]}, and a step at layer {until} cuts it again: how "
                "many tokens both keep depends on their scores",
                "remove earlier_caches, or use cache-only steps at later layers only",
            )
        return until

    def _layer_steps(self, depth: int, *, cache_only: bool) -> list[tuple[int, Step]]:
        if self.steps and not any(len(step.layer_range(depth)) for step in self.steps):
            names = ", ".join(repr(step.layers) for step in self.steps)
            raise PlanError(
                f"layers {names} begin after the last one of a decoder of {depth} layers: nothing is pruned"
            )
        steps = [step for step in self.steps if step.cache_only == cache_only]
        return sorted(((layer, step) for step in steps for layer in step.layer_range(depth)), key=lambda cut: cut[0])

    def schedule(self, layout: Layout, depth: int) -> tuple[Cut, ...]:
        """The cuts of a prompt, known before anything runs.  Raises: PlanError."""
        return _schedule(self.cuts(depth), layout, self._efforts(layout, depth))

    def cache_schedule(self, layout: Layout, depth: int) -> tuple[Cut, ...]:
        """The cuts of a prompt that change a layer's cache alone.  Raises: PlanError."""
        cuts = self._layer_steps(depth, cache_only=True)
        return _cache_schedule(cuts, self.layers(layout, depth), layout, self._efforts(layout, depth))

    def cache_tokens(self, layout: Layout, depth: int) -> tuple[int, ...]:
        """The number of prompt tokens in every layer's cache.  Raises: PlanError."""
        running, efforts = self.layers(layout, depth), self._efforts(layout, depth)
        cache_schedule = _cache_schedule(self._layer_steps(depth, cache_only=True), running, layout, efforts)
        return _cached(running, cache_schedule, self.earlier_caches_until(depth))

    def layers(self, layout: Layout, depth: int) -> tuple[Remaining, ...]:
        """The numbers of tokens that every layer runs on, by groups whose split is known.  Raises: PlanError."""
        return _running(layout, depth, self.schedule(layout, depth))

    def by_layer(self, layout: Layout, depth: int) -> list[dict[str, int]]:
        """`layers` with the groups' names as keys: a pool's name where only the scores decide which modality is kept.

        Raises: PlanError.
        """
        return [{Pool(group).name: n for group, n in layer.items() if n} for layer in self.layers(layout, depth)]

    def tokens(self, layout: Layout, depth: int) -> tuple[int, ...]:
        """The number of tokens that every layer runs on.  Raises: PlanError."""
        return tuple(sum(layer.values()) for layer in self.layers(layout, depth))

    def _efforts(self, layout: Layout, depth: int) -> Efforts | None:
        """The efforts at which a prompt costs what the target says; None without a target.  Raises: PlanError."""
        return None if self.target is None else _solve(self, layout, depth, self.target.shape)

    def require(self, model: str, layers: int, hidden: int) -> None:
        """Refuse a model that the plan was not made for.  Raises: PlanError."""
        origin = (model, layers, hidden) if self.origin is None else tuple(self.origin[key] for key in _ORIGIN_KEYS)
        if origin != (model, layers, hidden):
            raise PlanError(
                f"the plan was calibrated for {origin[0]} with {origin[1]} layers of width {origin[2]}, "
                f"but this is {model} with {layers} layers of width {hidden}",
                "calibrate for this model: fastav calibrate",
            )

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that differ when the steps or targets differ; name and origin do not count."""
        steps: list[Any] = [step.to_dict() for step in self.steps]
        steps += [] if self.target is None else [self.target.to_dict()]
        return hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """The plan as JSON text."""
        data = {"fastav_plan": self.VERSION, "name": self.name, "steps": [step.to_dict() for step in self.steps]}
        data |= {} if self.target is None else {"target": self.target.to_dict()}
        data |= {} if self.origin is None else {"origin": dict(self.origin)}
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`.  Raises: PlanError, UnknownName."""
        try:
            parsed = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"a plan must be JSON: {reason_of(error)}") from None
        data = _json_object("plan", parsed, required={"fastav_plan", "name", "steps"}, optional={"origin", "target"})
        target = None if data.get("target") is None else Target.from_dict(data["target"])
        origin = _origin(data.get("origin"))
        if data["fastav_plan"] != cls.VERSION or isinstance(data["fastav_plan"], bool):
            raise PlanError(
                f"plan version {data['fastav_plan']!r} is not supported",
                f"this release reads version {cls.VERSION}: create the plan again",
            )
        if not isinstance(data["name"], str) or not isinstance(data["steps"], list):
            raise PlanError("a plan's name must be a string and its steps a list")
        steps = cast("list[Any]", data["steps"])
        return cls(tuple(Step.from_dict(step) for step in steps), data["name"], origin, target)

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


def _token_counts(layout: Layout) -> Remaining:
    return {frozenset({m}): layout.count(m) for m in Modality}


def _apply_counts(remaining: Remaining, counts: Remaining) -> Remaining:
    """The remaining tokens after a cut: each pool becomes one group."""
    outside = {group: n for group, n in remaining.items() if not any(group <= pool for pool in counts)}
    return {**outside, **counts}


def _schedule(cuts: Sequence[tuple[int, Step]], layout: Layout, efforts: Efforts | None) -> tuple[Cut, ...]:
    """The cuts of a prompt.  efforts: of a plan with a target."""
    remaining = entering = _token_counts(layout)
    schedule: list[Cut] = []
    for layer, step in cuts:
        counts = step.keep.counts(layout, remaining, efforts, entering)
        remaining = _apply_counts(remaining, counts)
        entering = remaining if layer == 0 else entering
        schedule.append(Cut(layer=layer, step=step, counts=counts, remaining=remaining))
    return tuple(schedule)


def _cache_schedule(
    cuts: Sequence[tuple[int, Step]], running: Sequence[Remaining], layout: Layout, efforts: Efforts | None
) -> tuple[Cut, ...]:
    """The cuts in caches alone.  running: numbers of tokens that each layer runs on."""
    if len({layer for layer, _ in cuts}) < len(cuts):
        raise PlanError("two cache-only steps name the same layer", "use one cache-only step per layer")
    schedule: list[Cut] = []
    for layer, step in cuts:
        counts = step.keep.counts(layout, running[layer], efforts, running[0])
        remaining = _apply_counts(running[layer], counts)
        schedule.append(Cut(layer=layer, step=step, counts=counts, remaining=remaining))
    return tuple(schedule)


@lru_cache(maxsize=32)
def _solve(plan: Plan, layout: Layout, depth: int, shape: DecoderShape | None) -> Efforts:
    """The efforts of a plan with a target for one prompt.

    shape: of the target, which does not count when plans are compared.
    Raises: PlanError if the plan cannot meet its target.
    """
    target = plan.target
    assert target is not None
    if not (media := layout.count(*MEDIA)):
        return dict.fromkeys(Modality, 0.0)  # there is nothing to prune
    cuts, cache_cuts = plan.cuts(depth), plan.cache_cuts(depth)
    until = plan.earlier_caches_until(depth)
    n_pools = sum(len(step.keep.pools()) for step in plan.steps)

    def layers(efforts: Efforts) -> tuple[Remaining, ...]:
        return _running(layout, depth, _schedule(cuts, layout, efforts))

    def cost(effort: float) -> float:
        efforts = dict.fromkeys(Modality, effort)
        running = layers(efforts)
        cached = _cached(running, _cache_schedule(cache_cuts, running, layout, efforts), until)
        return target.cost(layout, running, cached)

    what = f"the target of {target} of the plan {plan.name or plan.fingerprint!r}"
    if target.share is not None:
        return dict.fromkeys(Modality, least_effort(cost, target.share, n_pools / media, what))
    shares = target.by_modality
    return {
        modality: least_effort(
            lambda effort, m=modality: modality_retention(layout, layers(dict.fromkeys(shares, effort)), m),
            share,
            n_pools / n,
            what,
        )
        if (n := layout.count(modality))
        else 0.0
        for modality, share in shares.items()
    }


def _running(layout: Layout, depth: int, schedule: Sequence[Cut]) -> tuple[Remaining, ...]:
    """The tokens that every layer runs on."""
    after_cut = {cut.layer: cut.remaining for cut in schedule}
    layers: list[Remaining] = []
    remaining = _token_counts(layout)
    for layer in range(depth):
        remaining = after_cut.get(layer, remaining)
        layers.append(remaining)
    return tuple(layers)


def _cached(running: Sequence[Remaining], cache_schedule: Sequence[Cut], until: int) -> tuple[int, ...]:
    """The number of tokens in every layer's cache.  until: as `Plan.earlier_caches_until`."""
    counts = [sum(layer.values()) for layer in running]
    counts[:until] = [counts[until]] * until
    for cut in cache_schedule:
        counts[cut.layer] = cut.total
    return tuple(counts)


def _origin(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    origin = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if not isinstance(origin.get("model"), str) or not all(
        isinstance(origin.get(key), int) for key in _ORIGIN_KEYS[1:]
    ):
        raise PlanError("a plan's origin must name model, layers and hidden", "remove it, or calibrate again")
    return origin


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(data := dict(pairs)) < len(pairs):
        raise PlanError(f"a key occurs twice among {', '.join(key for key, _ in pairs)}")
    return data


def _json_object(
    what: str, data: Any, *, required: Set[str] = frozenset(), optional: Set[str] = frozenset()
) -> dict[str, Any]:
    """The data as a dict, checked.  Raises: PlanError for other types, and for unknown or missing keys."""
    if not isinstance(data, dict):
        raise PlanError(f"a {what} must be a JSON object, got {type(data).__name__}")
    result, known = cast("dict[str, Any]", data), required | optional
    if unknown := sorted(result.keys() - known):
        raise PlanError(f"a {what} has no {', '.join(map(repr, unknown))}", f"known: {', '.join(sorted(known))}")
    if missing := sorted(required - result.keys()):
        raise PlanError(f"a {what} needs {', '.join(map(repr, missing))}")
    return result
