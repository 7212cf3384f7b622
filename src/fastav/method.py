"""Which tokens stay: a method scores, `select` picks.

How many stay is none of a method's business: that is `fastav.plan.Keep`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastav.errors import PlanError, reason_of
from fastav.layout import Modality
from fastav.plan import Step
from fastav.registry import METHODS


class Signal(StrEnum):
    """What a method can ask an engine for, beyond the layout."""

    LAST_QUERY = "last-query"  # attention of the last query over the tokens of the layer before, head mean
    TEXT_QUERIES = "text-queries"  # the same, mean over the queries of the text behind the last audio or video token
    WINDOW = "window"  # the same, mean over the last 32 queries
    ROLLOUT = "rollout"  # the last query's row of the attention rollout through all layers so far (fastav.rollout)
    KEYS = "keys"  # key vectors of the layer before, as `View.keys`
    ENCODER = "encoder"  # attention that each audio token receives in the audio encoder's last layer, 0 for others
    GIVEN = "given"  # scores that the caller brought along


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The layouts of a batch as tensors on the model's device, left-padded, with one column more than the prompt.

    modality: -1 where the batch is padded, and in the last column, to which rows with fewer tokens point.
    position: counted from each row's first real token. padding, frame, second: as in `Layout`. place: of a token among
    those of its modality and frame, so that tokens with the same place in two frames show the same part of the picture.
    question: text behind the last audio or video token, and the prompt's last token.
    """

    modality: Int[Tensor, "batch prompt"]
    position: Int[Tensor, "batch prompt"]
    padding: Bool[Tensor, "batch prompt"]
    frame: Int[Tensor, "batch prompt"]
    place: Int[Tensor, "batch prompt"]
    second: Float[Tensor, "batch prompt"]
    question: Bool[Tensor, "batch prompt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a method may look at: the tokens still there, entering one layer.

    layer: the layer about to run. prompt: all tokens. slots: column in `prompt` of each token still there; rows with
    fewer tokens point to its last column at their left, and what is scored there is ignored. hidden: what enters the
    layer. keys: of the layer before, after RoPE; None unless the method needs `Signal.KEYS`.
    """

    layer: int
    prompt: Prompt
    slots: Int[Tensor, "batch tokens"]
    signals: Mapping[Signal, Float[Tensor, "batch tokens"]]
    hidden: Float[Tensor, "batch tokens features"]
    keys: Float[Tensor, "batch kv_heads tokens head"] | None = None

    def __getitem__(self, signal: Signal) -> Float[Tensor, "batch tokens"]:
        return self.signals[signal]

    @property
    def modality(self) -> Int[Tensor, "batch tokens"]:
        """A `Modality` per token."""
        return self.prompt.modality.gather(1, self.slots)

    @property
    def position(self) -> Int[Tensor, "batch tokens"]:
        """Place in the unpruned prompt."""
        return self.prompt.position.gather(1, self.slots)

    @property
    def padding(self) -> Bool[Tensor, "batch tokens"]:
        """Whether a token is padding by construction."""
        return self.prompt.padding.gather(1, self.slots)

    @property
    def frame(self) -> Int[Tensor, "batch tokens"]:
        """Index of the sampled frame that a token shows or accompanies; -1 where there is none."""
        return self.prompt.frame.gather(1, self.slots)

    @property
    def place(self) -> Int[Tensor, "batch tokens"]:
        """Which part of its frame (or of the sound that accompanies it) a token is, counted from 0."""
        return self.prompt.place.gather(1, self.slots)

    @property
    def second(self) -> Float[Tensor, "batch tokens"]:
        """Where a token's content starts in the clip, in seconds; NaN where that is unknown."""
        return self.prompt.second.gather(1, self.slots)


class Method(ABC):
    """Scores tokens; the highest stay.  Subclasses are frozen dataclasses whose fields are their options."""

    needs: ClassVar[frozenset[Signal]] = frozenset()

    @abstractmethod
    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """A finite score for every token still there; ties go to the earlier token."""

    def merge(
        self, view: View, chosen: Int[Tensor, "batch kept"], real: Bool[Tensor, "batch kept"]
    ) -> Float[Tensor, "batch kept features"]:
        """The hidden states of the tokens that stay, in the dtype of `view.hidden`: here, as they are.

        A method that overrides this lets what stays take in some of what goes. Positions, signals and keys of the
        tokens that stay are not merged. chosen: indices of the tokens that stay, as `select` gives them. real: which of
        those there are; what is said of the others is ignored.
        """
        return view.hidden.gather(1, chosen[..., None].expand(-1, -1, view.hidden.shape[2]))

    @property
    def merges(self) -> bool:
        """Whether what stays takes in some of what goes."""
        return type(self).merge is not Method.merge


def method_of(step: Step) -> Method:
    """The method that a step names, with its options.

    Raises: UnknownName; PlanError if the method has no such option or refuses its value.
    """
    method: type[Method] = METHODS[step.method]
    options: Mapping[str, Any] = step.options
    try:
        return method(**options)
    except TypeError as error:
        known = ", ".join(f.name for f in (fields(method) if is_dataclass(method) else ())) or "none"
        raise PlanError(
            f"method {step.method!r} got options {dict(options)}: {reason_of(error)}", f"its options: {known}"
        ) from None


class Contest(NamedTuple):
    """Which of some tokens compete for a cut's budgets.

    head_start: 0 for those that do, +inf for those that stay whatever their score, -inf where there is no token.
    kind: the number of a token's pool; of one that is in none, how many pools there are; one more where there is none.
    """

    head_start: Float[Tensor, "batch tokens"]
    kind: Int[Tensor, "batch tokens"]

    @classmethod
    def of(
        cls, modality: Int[Tensor, "batch tokens"], pools: Sequence[frozenset[Modality]], *, last: int = -1
    ) -> "Contest":
        """That of tokens of which those in the column `last` always stay, and those of modality -1 are none."""
        kind = torch.full_like(modality, len(pools), dtype=torch.long)
        for number, pool in enumerate(pools):
            for m in pool:
                kind.masked_fill_(modality == int(m), number)
        kind.masked_fill_(modality < 0, len(pools) + 1)
        head_start = torch.zeros(kind.shape, device=kind.device)
        head_start.masked_fill_(kind == len(pools), torch.inf).masked_fill_(kind > len(pools), -torch.inf)
        head_start[:, last].fill_(torch.inf)
        return cls(head_start, kind)


def select(
    scores: Float[Tensor, "batch tokens"],
    modality: Int[Tensor, "batch tokens"],
    counts: Sequence[tuple[frozenset[Modality], Int[Tensor, " batch"]]],
    width: int,
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
    """The indices that stay, in prompt order and left-padded to `width`, and which of them are real.

    Of each pool of `counts` its highest scores stay, ties going to the earlier token; what is in no pool stays; what
    has modality -1 goes. The last token always stays. Nothing here waits for the device: `width` is the largest number
    of tokens that a row keeps, known from the layouts.

    Raises: PlanError if a score is NaN (looked at on the CPU only: elsewhere it would stall the device).
    """
    contest = Contest.of(modality, [pool for pool, _ in counts])
    everything = torch.full_like(modality[:, 0], modality.shape[1])
    limits = torch.stack([*(count for _, count in counts), everything, torch.zeros_like(everything)], dim=1)
    return select_of(scores, contest.head_start, contest.kind, limits, width)


def select_of(
    scores: Float[Tensor, "batch tokens"],
    head_start: Float[Tensor, "batch tokens"],
    kind: Int[Tensor, "batch tokens"],
    limits: Int[Tensor, "batch kinds"],
    width: int,
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
    """`select` among the tokens of a `Contest`.  limits: how many of each kind stay."""
    order = _ranked(scores, head_start)
    ranked = kind.gather(1, order)
    kinds = torch.arange(limits.shape[1], device=kind.device)
    rank = (ranked[:, None] == kinds[:, None]).cumsum(2).gather(1, ranked[:, None])[:, 0]
    # what goes becomes -1, which sorts to the left
    index = order.masked_fill(rank > limits.gather(1, ranked), -1).sort(dim=1).values[:, order.shape[1] - width :]
    return index.clamp(min=0), index >= 0


def select_even(
    scores: Float[Tensor, "batch tokens"], head_start: Float[Tensor, "batch tokens"], width: int
) -> Int[Tensor, "batch width"]:
    """`select` among the tokens of a `Contest` for one pool, of which every row keeps `width` with all that is exempt.

    Then the exempt ones and the best of the pool are the first so many: no row or pool need be counted on the device.
    """
    return _ranked(scores, head_start)[:, :width].sort(dim=1).values


def _ranked(
    scores: Float[Tensor, "batch tokens"], head_start: Float[Tensor, "batch tokens"]
) -> Int[Tensor, "batch tokens"]:
    """Indices from the highest score to the lowest, equal ones in their order."""
    if scores.device.type == "cpu" and bool(scores.isnan().any()):
        raise PlanError("a score is NaN", "the model's hidden states or the given scores are not finite")
    return (scores + head_start).argsort(dim=1, descending=True, stable=True)
