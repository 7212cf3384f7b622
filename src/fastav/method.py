"""Methods score tokens; `fastav.pruning.selection` keeps those with the highest scores.

The number of tokens to keep comes from `fastav.plan.Keep`, never from a method.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any, ClassVar, cast

from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastav.errors import PlanError, UndeclaredSignal, reason_of
from fastav.layout import Layout, Modality
from fastav.plan import Step
from fastav.registry import METHODS


class Signal(StrEnum):
    """An input that a method declares and reads, beyond modality, item, position, pool and padding.

    FRAMES, SECONDS and QUESTION are part of the layout. All others exist only while the model runs.
    """

    FRAMES = "frames"  # `View.frame` and `View.place`
    SECONDS = "seconds"  # `View.second` and `View.last_second`
    HIDDEN_STATES = "hidden-states"  # `View.hidden`: what the layer receives
    KEYS = "keys"  # `View.keys`: key vectors of the preceding layer
    LAST_QUERY = "last-query"  # attention of the last query over the tokens of the preceding layer, mean over heads
    TEXT_QUERIES = "text-queries"  # the same, mean over the queries of the text behind the last audio or video token
    WINDOW = "window"  # the same, mean over the last 32 queries
    OWN_LAST_QUERY = "own-last-query"  # LAST_QUERY of the layer about to run, from what it receives before its cuts
    OWN_TEXT_QUERIES = "own-text-queries"  # TEXT_QUERIES of that layer
    ROLLOUT = "rollout"  # the last query's row of the attention rollout through all preceding layers
    AUDIO_ENCODER = "audio-encoder"  # attention that each audio token receives in its encoder's last layer, else 0
    VISION_ENCODER = "vision-encoder"  # the same of video and image tokens in the vision encoder
    GIVEN = "given"  # scores that the caller passes
    QUESTION = "question"  # `View.question`


LAYOUT_SIGNALS = frozenset({Signal.FRAMES, Signal.SECONDS, Signal.QUESTION})
ENCODER_SIGNALS = frozenset({Signal.AUDIO_ENCODER, Signal.VISION_ENCODER})  # of some models, as their adapters say
ATTENTION_SIGNALS = frozenset({Signal.LAST_QUERY, Signal.TEXT_QUERIES, Signal.WINDOW})  # means over heads
OWN_SIGNALS = frozenset({Signal.OWN_LAST_QUERY, Signal.OWN_TEXT_QUERIES})  # the same, of the layer about to run
_PROPERTIES = {
    Signal.FRAMES: "frame, view.place",
    Signal.SECONDS: "second, view.last_second",
    Signal.QUESTION: "question",
    Signal.HIDDEN_STATES: "hidden",
    Signal.KEYS: "keys",
}
DECODER_SIGNALS = ATTENTION_SIGNALS | {Signal.ROLLOUT, Signal.KEYS}  # computed by layers before the cut


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLayout:
    """The layouts of a batch as tensors on the model's device, left-padded, with one column more than the prompt.

    modality: -1 where the batch is padded, and in the last column, to which rows with fewer tokens point. position:
    counted from each row's first real token. item, padding, frame, second: as in `Layout`. last_second: the largest
    second of the token's item; NaN if all are unknown. place: index of a token among those of its modality, item and
    frame, so that tokens with the same place in two frames show the same part of the picture. question: text behind the
    last audio or video token, and the prompt's last token. layouts: the same on the host, one per row.
    """

    modality: Int[Tensor, "batch columns"]
    item: Int[Tensor, "batch columns"]
    position: Int[Tensor, "batch columns"]
    padding: Bool[Tensor, "batch columns"]
    frame: Int[Tensor, "batch columns"]
    place: Int[Tensor, "batch columns"]
    second: Float[Tensor, "batch columns"]
    last_second: Float[Tensor, "batch columns"]
    question: Bool[Tensor, "batch columns"]
    layouts: tuple[Layout, ...] = ()


class View:
    """The remaining tokens before one layer, as a method reads them.

    layer: the layer about to run. slots: the column in the padded prompt of each remaining token; the left end of rows
    with fewer tokens points to the last column, and scores there are ignored. pool: index of each column's budget in
    the step's `Keep`, the number of budgets or more for columns in none. method: the name of the method. kept: the
    largest number of tokens that a row keeps of each budget, known without waiting for the device; None if all are to
    be ranked. A method may stop there: tokens behind it in its order may have any lower scores.

    Reading a signal that is not in `needs` raises UndeclaredSignal, whether or not the engine has computed it; so does
    `get` with a signal that is neither there nor in `wants`.
    """

    __slots__ = ("_layout", "_method", "_needs", "_pool", "_signals", "_wants", "kept", "layer", "slots")

    def __init__(
        self,
        *,
        layer: int,
        layout: BatchLayout,
        slots: Int[Tensor, "batch tokens"],
        pool: Int[Tensor, "batch columns"],
        signals: Mapping[Signal, Float[Tensor, "batch *axes"]],
        method: str,
        needs: frozenset[Signal],
        wants: frozenset[Signal] = frozenset(),
        kept: Mapping[frozenset[Modality], int] | None = None,
    ) -> None:
        self.layer, self.slots, self._pool, self.kept = layer, slots, pool, kept
        self._layout, self._signals, self._method, self._needs, self._wants = layout, signals, method, needs, wants

    def __getitem__(self, signal: Signal | str) -> Float[Tensor, "batch tokens"]:
        """The scores of a signal.  Raises: UndeclaredSignal; PlanError for a signal that a property returns."""
        if (signal := Signal(signal)) in _PROPERTIES:
            raise PlanError(f"view[Signal.{signal.name}] is not a score", f"read view.{_PROPERTIES[signal]}")
        return self._read(signal)

    def get(self, signal: Signal | str) -> Float[Tensor, "batch tokens"] | None:
        """The scores of a signal; None for one that the method only wants, if the model does not provide it.

        Raises: as `view[signal]`.
        """
        signal = Signal(signal)
        return self._signals.get(signal) if signal in self._wants - self._needs else self[signal]

    @property
    def hidden(self) -> Float[Tensor, "batch tokens features"]:
        """Hidden states that the layer receives: `Signal.HIDDEN_STATES`."""
        return self._read(Signal.HIDDEN_STATES)

    @property
    def keys(self) -> Float[Tensor, "batch kv_heads tokens head"]:
        """Keys of the preceding layer, after RoPE: `Signal.KEYS`."""
        return self._read(Signal.KEYS)

    @property
    def modality(self) -> Int[Tensor, "batch tokens"]:
        """The `Modality` of each token."""
        return self._layout.modality.gather(1, self.slots)

    @property
    def item(self) -> Int[Tensor, "batch tokens"]:
        """Index of the clip, sound or image that a token is of, counted in its prompt; -1 for text."""
        return self._layout.item.gather(1, self.slots)

    @property
    def pool(self) -> Int[Tensor, "batch tokens"]:
        """Index of the budget for which a token competes; the number of budgets or more for tokens that are in none."""
        return self._pool.gather(1, self.slots)

    @property
    def position(self) -> Int[Tensor, "batch tokens"]:
        """Position in the unpruned prompt."""
        return self._layout.position.gather(1, self.slots)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The prompts on the host, to plan work without waiting for the device: `Signal.FRAMES`, `Signal.SECONDS`."""
        self._require(Signal.FRAMES)
        self._require(Signal.SECONDS)
        return self._layout.layouts

    @property
    def columns(self) -> int:
        """Number of columns of the padded prompts."""
        return self._layout.modality.shape[1] - 1

    @property
    def padding(self) -> Bool[Tensor, "batch tokens"]:
        """Whether a token encodes only padding."""
        return self._layout.padding.gather(1, self.slots)

    @property
    def question(self) -> Bool[Tensor, "batch tokens"]:
        """Whether a token is text behind the last audio or video token, or the prompt's last: `Signal.QUESTION`."""
        self._require(Signal.QUESTION)
        return self._layout.question.gather(1, self.slots)

    @property
    def frame(self) -> Int[Tensor, "batch tokens"]:
        """Index in its clip of the sampled frame that a token shows or accompanies, -1 for none: `Signal.FRAMES`."""
        self._require(Signal.FRAMES)
        return self._layout.frame.gather(1, self.slots)

    @property
    def place(self) -> Int[Tensor, "batch tokens"]:
        """Index, from 0, of a token within its frame or the sound that accompanies it: `Signal.FRAMES`."""
        self._require(Signal.FRAMES)
        return self._layout.place.gather(1, self.slots)

    @property
    def second(self) -> Float[Tensor, "batch tokens"]:
        """Start of a token's content in its clip, in seconds; NaN if unknown: `Signal.SECONDS`."""
        self._require(Signal.SECONDS)
        return self._layout.second.gather(1, self.slots)

    @property
    def last_second(self) -> Float[Tensor, "batch tokens"]:
        """The largest `second` of a token's clip in the unpruned prompt; NaN if all are unknown: `Signal.SECONDS`."""
        self._require(Signal.SECONDS)
        return self._layout.last_second.gather(1, self.slots)

    def _read(self, signal: Signal) -> Tensor:
        self._require(signal)
        return self._signals[signal]

    def _require(self, signal: Signal) -> None:
        if signal in self._needs:
            return
        hint = f"declare needs = frozenset({{Signal.{signal.name}, ...}}) in the method's class"
        if signal in self._wants:
            hint = f"read view.get(Signal.{signal.name}), which is None where the model does not provide it; or {hint}"
        raise UndeclaredSignal(
            f"method {self._method!r} reads the signal {signal.value!r}, which its `needs` does not name", hint
        )


class Method(ABC):
    """The base class of methods, which score tokens: those with the highest scores are kept.

    Subclasses are frozen dataclasses whose fields are their options. They keep no state: an engine makes one instance
    per step of a plan, and uses it for all requests, from any thread.

    needs: every signal that `score` and `merge` read. Engines compute these and no others, and derive from them what a
    method can be combined with: chunked prefill, for example, requires `layout_only`.
    wants: those of `ENCODER_SIGNALS` that the method reads, by `View.get`, where the model's adapter provides them, and
    does without elsewhere. Where provided, they count as needed: an engine that cannot compute them refuses the plan.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset()
    wants: ClassVar[frozenset[Signal]] = frozenset()

    @abstractmethod
    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """A finite score for every remaining token; of two equal scores the earlier token counts as higher."""

    def merge(
        self, view: View, indices: Int[Tensor, "batch kept"], valid: Bool[Tensor, "batch kept"]
    ) -> Float[Tensor, "batch kept features"]:
        """The hidden states of the kept tokens, in the dtype of `view.hidden`; unchanged unless overridden.

        A method that overrides this adds parts of dropped tokens to kept ones, and needs `HIDDEN_STATES`. Positions,
        signals and keys are not merged. indices: of the kept tokens, from `select`. valid: which indices stand for a
        token; hidden states at the others are ignored.
        """
        return view.hidden.gather(1, indices[..., None].expand(-1, -1, view.hidden.shape[2]))

    @property
    def merges(self) -> bool:
        """Whether the method adds parts of dropped tokens to kept ones."""
        return type(self).merge is not Method.merge

    @property
    def layout_only(self) -> bool:
        """Whether the layout alone decides which tokens are kept, so that nothing has to run first."""
        return self.needs | self.wants <= LAYOUT_SIGNALS


def needs_of(name: str, method: type[Method]) -> frozenset[Signal]:
    """The signals that a method needs.  Raises: PlanError if `needs` is no frozenset of `Signal` on the class."""
    return _declared(name, "needs", method.needs, "KEYS")


def wants_of(name: str, method: type[Method]) -> frozenset[Signal]:
    """The signals that a method wants.

    Raises: PlanError if `wants` is no frozenset of `Signal` on the class, or names others than `ENCODER_SIGNALS`.
    """
    wants = _declared(name, "wants", method.wants, "VISION_ENCODER")
    if others := wants - ENCODER_SIGNALS:
        raise PlanError(
            f"method {name!r} wants {', '.join(sorted(others))}: only {' and '.join(sorted(ENCODER_SIGNALS))} can be "
            "wanted, as only they depend on the model",
            "declare the other signals in `needs`",
        )
    return wants


def _declared(name: str, attribute: str, signals: Any, example: str) -> frozenset[Signal]:
    """Signals that a method's class declares.  Raises: PlanError if they are no frozenset of `Signal`."""
    if type(signals) is not frozenset or set(map(type, cast(frozenset[Any], signals))) - {Signal}:
        raise PlanError(
            f"method {name!r} must declare `{attribute}` on its class, as a frozenset of fastav.Signal",
            f"for example {attribute}: ClassVar[frozenset[Signal]] = frozenset({{Signal.{example}}})",
        )
    return cast(frozenset[Signal], signals)


def method_of(step: Step) -> Method:
    """The method that a step names, with its options.

    Raises: UnknownName; PlanError if the method has no such option, refuses its value, or does not declare `needs` and
    `wants`.
    """
    method: type[Method] = METHODS[step.method]
    needs_of(step.method, method)
    wants_of(step.method, method)
    options: Mapping[str, Any] = step.options
    try:
        return method(**options)
    except TypeError as error:
        known = ", ".join(f.name for f in (fields(method) if is_dataclass(method) else ())) or "none"
        raise PlanError(
            f"method {step.method!r} got options {dict(options)}: {reason_of(error)}", f"its options: {known}"
        ) from None
