"""Targets: what a plan's prefill costs in all, from which the numbers of tokens of its steps are solved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from fastav.budgets import is_number
from fastav.errors import PlanError
from fastav.flops import DecoderShape, kv_bytes, prefill_flops
from fastav.layout import Layout, Modality

Remaining = Mapping[frozenset[Modality], int]  # numbers of remaining tokens, by groups whose split is known
Efforts = Mapping[Modality, float]  # of the budgets of each modality, as in `Budget.scaled`

_SUFFIXES = {"retention": "r", "flops": "flops", "kv_bytes": "kv"}
_KINDS = tuple(_SUFFIXES)
_HALVINGS = 40  # of the interval in which an effort is found
_ROUNDING = 1e-12  # of a cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The cost that a plan must not exceed, as a share of the unpruned model's; exactly one of three.

    retention: tokens of audio, video and images that decoder layers run on, mean over layers ("mean retention"); or
    such a share for each modality, by label. flops: of the prefill, as `fastav.flops.prefill_flops` counts them, text
    included. kv_bytes: of the prompt in the KV cache, text included.
    shape: the decoder, which flops and kv_bytes need; not a part of the plan's JSON.

    Raises: PlanError.
    """

    retention: float | int | Mapping[str, float | int] | None = field(default=None, hash=False)
    flops: float | int | None = None
    kv_bytes: float | int | None = None
    shape: DecoderShape | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        given = self.to_dict()
        if len(given) != 1:
            raise PlanError(
                f"a target must be one of {', '.join(_KINDS)}, got {', '.join(given) or 'none'}",
                'e.g. {"retention": 0.25}',
            )
        ((kind, value),) = given.items()
        _check(kind, value)
        object.__setattr__(self, kind, value)  # a copy of a mapping

    @property
    def by_modality(self) -> dict[Modality, float]:
        """The shares of single modalities, if the target has such."""
        shares = self.retention if isinstance(self.retention, Mapping) else {}
        return {Modality[label.upper()]: float(share) for label, share in shares.items()}

    @property
    def share(self) -> float | None:
        """The share of the cost; None if the target is by modality."""
        ((_, value),) = self.to_dict().items()
        return None if self.by_modality else float(value)

    @property
    def suffix(self) -> str:
        """What names of plans say after @: `r=0.25`, `flops=0.4`, `kv=0.3`, `r=audio:0.5+video:0.2`."""
        ((kind, value),) = self.to_dict().items()
        shares = "+".join(f"{m.label}:{share:.4g}" for m, share in self.by_modality.items())
        return f"{_SUFFIXES[kind]}={shares or format(value, '.4g')}"

    @classmethod
    def from_suffix(cls, text: str) -> "Target":
        """The inverse of `suffix`.  Raises: PlanError."""
        key, _, value = text.partition("=")
        kinds = {short: kind for kind, short in _SUFFIXES.items()}
        try:
            kind, target = kinds[key], cast("Any", _shares(value) if ":" in value else float(value))
        except (KeyError, ValueError):
            raise PlanError(
                f"{text!r} is no target", "write r=0.25, r=audio:0.5+video:0.2, flops=0.4 or kv=0.3"
            ) from None
        return cls(**{kind: target})

    def to_dict(self) -> dict[str, Any]:
        """The target as a JSON object."""
        values = {name: getattr(self, name) for name in _KINDS}
        return {
            name: dict(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else value
            for name, value in values.items()
            if value is not None
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Target":
        """The inverse of `to_dict`.  Raises: PlanError."""
        kinds = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
        if len(kinds) != 1 or kinds.keys() - set(_KINDS):
            raise PlanError(
                f"a plan's target must be one of {', '.join(_KINDS)}, got {data!r}", 'e.g. {"retention": 0.25}'
            )
        ((kind, value),) = kinds.items()
        _check(kind, value)
        return cls(**{kind: value})

    def __str__(self) -> str:
        ((kind, value),) = self.to_dict().items()
        shares = self.by_modality
        text = ", ".join(f"{m.label} {share:.4g}" for m, share in shares.items()) if shares else f"{value:.4g}"
        return f"{kind} {text}"

    def cost(self, layout: Layout, layers: Sequence[Remaining], cached: Sequence[int]) -> float:
        """The cost of a prompt as a share of the unpruned model's.

        layers: numbers of tokens that each layer runs on. cached: numbers in each layer's cache.
        Raises: PlanError if a pool mixes text with media, for a retention; if flops or kv_bytes have no shape.
        """
        if self.retention is not None:
            return _retention(layout, layers)
        if self.shape is None:
            raise PlanError(
                "a target of flops or kv_bytes needs the decoder's shape", "use plan.for_decoder(adapter.shape(config))"
            )
        full = [len(layout)] * self.shape.layers
        if self.flops is not None:
            return prefill_flops(self.shape, [sum(n.values()) for n in layers]) / prefill_flops(self.shape, full)
        return kv_bytes(self.shape, cached) / kv_bytes(self.shape, full)


def _check(kind: str, value: Any) -> None:
    """Refuse what is no share, or for a retention no shares by modality.  Raises: PlanError."""
    shares: list[Any] = [value]
    if kind == "retention" and isinstance(value, Mapping):
        by_modality = cast("Mapping[Any, Any]", value)
        labels = [m.label for m in Modality if m is not Modality.TEXT]
        if not by_modality or set(by_modality) - set(labels):
            raise PlanError(f"a target's {kind} by modality must name some of {', '.join(labels)}, got {value!r}")
        shares = list(by_modality.values())
    for share in shares:
        if not (is_number(share) and 0 < share <= 1):
            raise PlanError(f"a target's {kind} must be a share in (0, 1], got {share!r}")


def modality_retention(layout: Layout, layers: Sequence[Remaining], modality: Modality) -> float:
    """The share of one modality's tokens that layers run on, mean over layers.  layers: as for `Target.cost`."""
    kept = sum(layer[frozenset({modality})] for layer in layers)
    return kept / (layout.count(modality) * len(layers))


def least_effort(cost: Callable[[float], float], most: float, slack: float, what: str) -> float:
    """The least effort in [0, 1] at which a cost is at most `most`, to 2^-40.

    cost: falls, or stays, as the effort rises. slack: by how much the cost may exceed `most` at full effort, and stay
    below it without any, since tokens are whole. what: the target and the plan, for messages.
    Raises: PlanError if no effort comes within the slack.
    """
    highest, lowest = cost(0.0), cost(1.0)
    if lowest > most + slack:
        raise PlanError(
            f"{what} cannot be met: its budgets can go down to {lowest:.1%}",
            "choose a plan that cuts at an earlier layer, or a target above that",
        )
    if highest < most - slack:
        raise PlanError(
            f"{what} cannot be met: its fixed steps leave {highest:.1%}",
            "choose a plan that keeps more, or a target below that",
        )
    if highest <= most + _ROUNDING:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= most + _ROUNDING else (middle, high)
    return high


def _retention(layout: Layout, layers: Sequence[Remaining]) -> float:
    kept = 0
    for layer in layers:
        for group, n in layer.items():
            if Modality.TEXT in group and len(group) > 1:
                raise PlanError(
                    "a pool of text and media has no known retention", "set a target of flops, or budget media alone"
                )
            kept += n if Modality.TEXT not in group else 0
    media = len(layout) - layout.count(Modality.TEXT)
    return kept / (media * len(layers))


def _shares(text: str) -> dict[str, float]:
    """The shares of `audio:0.5+video:0.2`.  Raises: ValueError."""
    parts = [part.partition(":") for part in text.split("+")]
    return {label: float(share) for label, _, share in parts}
