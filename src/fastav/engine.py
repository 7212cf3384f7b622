"""The interface of engines: an engine answers requests under a plan, and reports what each answer cost."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig

from fastav.adapter import ModelAdapter, Prepared
from fastav.errors import FastAVError, UnsupportedModel, UnsupportedPlan
from fastav.flops import Saving
from fastav.formatting import brief_repr, plural
from fastav.inspection import Inspection
from fastav.method import Signal
from fastav.plan import Plan
from fastav.pruning.compiled import CompiledPlan
from fastav.pruning.rollout import ALPHA
from fastav.request import Request
from fastav.request_lock import Cancellation
from fastav.retention import mean_retention
from fastav.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Deprecated: pass the keyword arguments of `generate` to the pipeline instead.  Will be removed in 0.4.

    Settings for choosing tokens: by default greedy, with the penalties of the model's generation config.

    temperature: 0 for greedy decoding; higher values sample more evenly. top_p: sample from the most likely tokens
    whose probabilities add up to this. top_k: sample from this many most likely tokens (None: all).
    repetition_penalty: divides the logits of tokens that have occurred (None: the model's setting). stop: texts that
    end an answer, and are not part of it. seed: for sampling (None: use torch's generator in its current state).

    Raises: FastAVError for values out of range.
    """

    temperature: float | int = 0.0
    top_p: float | int = 1.0
    top_k: int | None = None
    repetition_penalty: float | int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __repr__(self) -> str:
        return brief_repr(self)

    def __post_init__(self) -> None:
        allowed = {
            "temperature must be 0 or more": 0 <= self.temperature < float("inf"),
            "top_p must be in (0, 1]": 0 < self.top_p <= 1,
            "top_k must be at least 1": self.top_k is None or self.top_k >= 1,
            "repetition_penalty must be more than 0": self.repetition_penalty is None or self.repetition_penalty > 0,
            "stop must hold texts that are not empty": all(self.stop),
        }
        for rule, is_met in allowed.items():
            if not is_met:
                raise FastAVError(f"{rule}, got {getattr(self, rule.split()[0])!r}")
        needs_sampling = self.top_p < 1 or self.top_k is not None or self.seed is not None
        if needs_sampling and not self.temperature:
            raise FastAVError("top_p, top_k and seed need temperature > 0", "set a temperature, e.g. 0.7")

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `generate` that these settings stand for; without those that are the model's."""
        is_on = self.temperature > 0
        settings: dict[str, Any] = {
            "do_sample": is_on,
            "num_beams": 1,
            "temperature": float(self.temperature) if is_on else None,
            "top_p": float(self.top_p) if is_on else None,
            "top_k": self.top_k or 0 if is_on else None,
        }
        if self.repetition_penalty is not None:
            settings["repetition_penalty"] = float(self.repetition_penalty)
        if self.stop:
            settings["stop_strings"] = list(self.stop)
        if self.seed is not None:
            settings["seed"] = self.seed
        return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A model's answer to one request, and its cost.

    text: the answer, without the stop text that ended it. token_ids: generated tokens, without the end marker. finish:
    `stop` if the model or a stop text ended the answer, `length` if it reached the maximum length. prompt_tokens: by
    modality, before pruning. tokens_per_layer: numbers of tokens that each layer ran on, by modality; by pool (`media`,
    `all`) where scores chose between modalities and the engine does not report which.
    flops: of the prefill, from the tokens that were kept (`fastav.flops`, the causal count). kv_bytes: keys and values
    of this prompt in all layers' caches after the prefill, before the first token is decoded: at most a window's tokens
    for a layer with a window, none for a layer that reads another layer's cache, and no batch padding. `full` is the
    cost without pruning.
    seconds: `media` (decode, sample, tokenize), `encode` (audio and video encoders with projectors), `prefill` (the
    rest of the first forward), `decode` (all later tokens); each for the whole batch. Work that was done ahead, while
    another batch was answered, counts too. With the engine vllm, `media` is the batch's, there is no `encode`, and
    `prefill` (encoders included) is the time from a request's first step to its first token, `decode` from there to its
    last token, in steps that the request shares with others.
    peak_bytes: peak memory while generating: allocated on the GPU, resident on the CPU (None where the system does not
    report it).
    dropped_ends: by modality, the first layer that runs on part of a clip's sound or video but on none of its last
    third, as `fastav.retention.dropped_ends`. Empty with the engine vllm, and in conversations.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: str
    plan: str
    prompt_tokens: Mapping[str, int]
    tokens_per_layer: tuple[Mapping[str, int], ...]
    flops: Saving
    kv_bytes: Saving
    seconds: Mapping[str, float]
    peak_bytes: int | None
    dropped_ends: Mapping[str, int] = field(default_factory=dict[str, int])

    def __repr__(self) -> str:
        tokens = f"{plural(sum(self.prompt_tokens.values()), 'prompt token')}, {len(self.token_ids)} new"
        costs = f"FLOPs {self.flops.ratio:.1%}, KV cache {self.kv_bytes.ratio:.1%}"
        seconds = f"{sum(self.seconds.values()):.2f} s"
        return f"Answer({self.text!r}, finish={self.finish!r}, plan={self.plan!r}: {tokens}, {costs}, {seconds})"

    @property
    def mean_retention(self) -> float | None:
        """The share of the prompt's audio, video and images that layers ran on, mean over layers; None if unknown."""
        return mean_retention(self.tokens_per_layer, self.prompt_tokens)

    def to_dict(self) -> dict[str, Any]:
        """The answer as a JSON object."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish": self.finish,
            "plan": self.plan,
            "prompt_tokens": dict(self.prompt_tokens),
            "tokens_per_layer": [dict(layer) for layer in self.tokens_per_layer],
            "mean_retention": self.mean_retention,
            "flops": self.flops.to_dict(),
            "kv_bytes": self.kv_bytes.to_dict(),
            "seconds": dict(self.seconds),
            "peak_bytes": self.peak_bytes,
            "dropped_ends": dict(self.dropped_ends),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Who waits for one answer of a batch.

    on_text: called with each piece of the answer as it is generated. cancellation: is checked before the batch's turn
    and at every token. A batch ends early once all its requests are cancelled; the answer of a cancelled request has
    the tokens until then.
    """

    on_text: Callable[[str], None] | None = None
    cancellation: Cancellation | None = None


@runtime_checkable
class Run(Protocol):
    """Answers a prepared batch, once.  listeners: one per request, or none at all.

    Raises: Cancelled if all requests are.
    """

    def __call__(self, listeners: Sequence[Listener] = ()) -> tuple[Answer, ...]:
        """The answers, in the order of the requests."""
        ...


@runtime_checkable
class Prepare(Protocol):
    """Prepares a batch.  prepared: what `ModelAdapter.prepare` gives for these requests, if that has been done.

    Raises: as `Engine.generate`.
    """

    def __call__(self, requests: Sequence[Request], prepared: Prepared | None = None) -> Run:
        """A function that answers the batch."""
        ...


def only_listener(listeners: Sequence[Listener]) -> Listener:
    """The listener of a request, for engines that listen to single requests.  Raises: FastAVError for several."""
    if len(listeners) > 1:
        raise FastAVError("this engine streams one answer at a time", "use the engine transformers")
    return listeners[0] if listeners else Listener()


class Conversation(ABC):
    """Turns of one conversation, which continue from one cache.  Made by `Engine.conversation`."""

    @abstractmethod
    def turn(self) -> AbstractContextManager[None]:
        """Hold the conversation from a question to its answer, for which other threads wait.

        Raises, on entry: FastAVError in a thread whose answer by the same model is not finished.
        """

    @abstractmethod
    def ask(
        self,
        request: Request,
        *,
        anew: bool = False,
        on_text: Callable[[str], None] | None = None,
        cancellation: Cancellation | None = None,
        **settings: Any,
    ) -> Answer:
        """Answer new messages, or, if `anew`, a whole conversation with a new cache.

        After an error the conversation is as it was before. Arguments and errors: as for `Engine.generate`.
        Raises also: FastAVError if the chat template changes earlier messages; PlanError for beams.
        """

    @abstractmethod
    def save(self, path: Path, fields: Mapping[str, Any]) -> None:
        """Write the conversation to a file.  fields: JSON, to store with it.  Raises: FastAVError."""

    @abstractmethod
    def load(self, path: Path) -> Mapping[str, Any]:
        """Continue from a file that `save` wrote; returns the fields that were stored with it.

        Raises: FastAVError if the file cannot be read, or is of another model, dtype or plan.
        """


class Engine(ABC):
    """A way to run models.

    provides: the signals that methods can read in this engine.
    """

    provides: ClassVar[frozenset[Signal]]

    @property
    @abstractmethod
    def device(self) -> str:
        """The device that the model runs on: `cpu`, `cuda:0`, ..."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The type of the model's weights: `float32`, `bfloat16`, ..."""

    @classmethod
    @abstractmethod
    def check(
        cls,
        config: PreTrainedConfig,
        plan: Plan,
        attention: str | None = None,
        *,
        adapter: ModelAdapter | None = None,
    ) -> CompiledPlan:
        """Compile a plan for a model, and refuse, before weights are loaded, whatever this engine cannot do exactly.

        attention: the implementation that the model will be loaded with, if known. adapter: the model's adapter; None
        to find it by the architectures in the configuration.
        Raises: PlanError, UnsupportedModel, UnsupportedPlan.
        """

    @classmethod
    @abstractmethod
    def load(
        cls,
        adapter: ModelAdapter,
        source: str,
        plan: Plan,
        *,
        device: str | None = None,
        dtype: str | None = None,
        attention: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> "Engine":
        """Load a model from a local folder or hub id, to run under a plan that `check` accepts.

        device, dtype, attention, model_kwargs: as for `fastav.pipeline`, which has refused those that contradict each
        other.
        Raises: CheckpointError; FastAVError for a device, dtype, attention or keyword that cannot be used.
        """

    @classmethod
    def from_model(cls, model: Any, processor: Any, plan: Plan | str) -> tuple["Engine", Plan, ModelAdapter]:
        """An engine for a model that the caller has loaded, the plan, checked for it, and the model's adapter.

        processor: None to load the one of the checkpoint that the model is from.
        Raises: UnsupportedModel if this engine loads its models itself; otherwise as `check` and `load`.
        """
        raise UnsupportedModel(
            f"{cls.__name__} cannot run a loaded model",
            "pass the model's folder or hub id, or use engine='transformers'",
        )

    def close(self) -> None:
        """Release what the engine holds outside this process.  A closed engine answers no more requests."""
        return

    @abstractmethod
    def generate(
        self,
        requests: Sequence[Request],
        plan: Plan,
        *,
        on_text: Callable[[str], None] | None = None,
        cancellation: Cancellation | None = None,
        **settings: Any,
    ) -> tuple[Answer, ...]:
        """Answer a batch of requests.

        on_text: called with each piece of the answer as it is generated; for single requests only. cancellation: is
        checked before the request's turn and at every token; for requests with `on_text`. settings: keyword arguments
        of transformers' `generate`, as `fastav.decoding.settings` resolves them.
        Raises: MediaError, PlanError, UnsupportedPlan; Cancelled.
        """

    def preparer(self, plan: Plan, **settings: Any) -> Prepare:
        """Return a function that prepares a batch ahead of its turn, and returns another that answers it.

        The first function may run in another thread than the one that answers, for one batch at a time, and raises what
        `generate` raises for these requests. The function that it returns is called at most once. By default it leaves
        all work to `generate`, and listens to single requests only.
        Raises: PlanError, UnsupportedPlan for a plan or settings with which no request can be answered.
        """

        def prepare(requests: Sequence[Request], prepared: Prepared | None = None) -> Run:
            def run(listeners: Sequence[Listener] = ()) -> tuple[Answer, ...]:
                one = only_listener(listeners)
                return self.generate(requests, plan, on_text=one.on_text, cancellation=one.cancellation, **settings)

            return run

        return prepare

    def conversation(self, plan: Plan) -> Conversation:
        """A new conversation under a plan.

        Raises: PlanError, UnsupportedPlan; UnsupportedModel if this engine keeps no cache between requests.
        """
        raise UnsupportedModel(
            f"{type(self).__name__} keeps no cache between requests",
            "pass all messages in each call, or use the engine transformers",
        )

    def trace(self, request: Request, plan: Plan, *, alpha: float = ALPHA) -> Trace:
        """Record the attention of one prefill under a plan, and its rollout with this alpha.

        Raises: UnsupportedPlan if this engine does not expose its attention; otherwise as `generate`.
        """
        raise UnsupportedPlan(f"{type(self).__name__} does not expose its attention", "use the engine transformers")

    def inspect(self, request: Request, plan: Plan) -> Inspection:
        """Record what every cut of one prefill under a plan drops.  The kept tokens are those of an answer's prefill.

        Raises: UnsupportedPlan if this engine does not expose its cuts; otherwise as `generate`.
        """
        raise UnsupportedPlan(f"{type(self).__name__} does not expose its cuts", "use the engine transformers")

    def forced_logits(
        self, requests: Sequence[Request], plan: Plan, answers: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "steps vocabulary"], ...]:
        """The logits of the next token along given answers to a batch of requests (teacher forcing).

        answers: one list of token ids per request; it may be empty. Row i of a result is what the model, under the
        plan, computes after the first i tokens of the answer, so an answer of n tokens has n + 1 rows. The results are
        in host memory, in the type that the model computes logits in, before any penalty.
        Raises: UnsupportedPlan if this engine does not expose its logits; otherwise as `generate`.
        """
        raise UnsupportedPlan(f"{type(self).__name__} does not expose its logits", "use the engine transformers")
