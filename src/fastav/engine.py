"""An engine carries a plan out: requests in, answers with their evidence out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from fastav.adapter import ModelAdapter, Request
from fastav.errors import FastAVError, UnsupportedPlan
from fastav.formatting import brief_repr, plural
from fastav.method import Signal
from fastav.plan import Plan
from fastav.pruning.compiled import CompiledPlan
from fastav.pruning.rollout import ALPHA
from fastav.trace import Trace


@dataclass(frozen=True, slots=True)
class Saving:
    """A cost without and with pruning."""

    full: int
    pruned: int

    @property
    def ratio(self) -> float:
        """Pruned over full."""
        return self.pruned / self.full

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"full": self.full, "pruned": self.pruned, "ratio": self.ratio}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen: by default the likeliest, under whatever penalties the model's own settings name.

    temperature: 0 for the likeliest token; otherwise tokens are drawn, the more evenly the higher it is. top_p: draw
    among the likeliest tokens that together have this probability. top_k: draw among so many (None: all).
    repetition_penalty: divides the logits of tokens that occurred (None: as the model's settings say). stop: texts at
    which an answer ends, without them. seed: of the draws (None: from torch's own generator as it stands).

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
        for rule, kept in allowed.items():
            if not kept:
                raise FastAVError(f"{rule}, got {getattr(self, rule.split()[0])!r}")
        drawing = self.top_p < 1 or self.top_k is not None or self.seed is not None
        if drawing and not self.temperature:
            raise FastAVError("top_p, top_k and seed say how tokens are drawn, which they are not", "set a temperature")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said, and what it cost.

    text: without the text that stopped it, if one did. token_ids: generated tokens, without the end marker. finish:
    `stop` if the model or a stop text ended it, `length` if it was cut. prompt_tokens: by modality, before pruning.
    tokens_per_layer: by modality, what each layer ran on; by pools of modalities (`media`, `all`) where scores chose
    among them and the engine does not tell.
    flops: of the prefill, from the tokens that were really kept (`fastav.flops`, the causal count). kv_bytes: keys and
    values that all layers' caches hold of this prompt once it is read, before the first token is decoded: no more than
    a window's of layers that have one, nothing of layers that read another's, and nothing of what fills up the rows
    of a batch. `full` is the same without pruning.
    seconds: `media` (decode, sample, tokenize), `encode` (audio and video encoders with projectors), `prefill` (the
    rest of the first forward), `decode` (all later tokens); of the whole batch, if there was one. What was done ahead,
    while another batch was answered, counts as well. Of the engine vllm, `media` is the batch's, there is no `encode`,
    and `prefill` and `decode` are the time between a request's own first step and its first token (encoders included),
    and from there to its last, in steps that it shares with other requests.
    peak_bytes: most memory in use while generating: allocated on the GPU, resident on the CPU (None where the system
    does not tell).
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

    def __repr__(self) -> str:
        tokens = f"{plural(sum(self.prompt_tokens.values()), 'prompt token')}, {len(self.token_ids)} new"
        costs = f"FLOPs {self.flops.ratio:.1%}, KV cache {self.kv_bytes.ratio:.1%}"
        took = f"{sum(self.seconds.values()):.2f} s"
        return f"Answer({self.text!r}, finish={self.finish!r}, plan={self.plan!r}: {tokens}, {costs}, {took})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish": self.finish,
            "plan": self.plan,
            "prompt_tokens": dict(self.prompt_tokens),
            "tokens_per_layer": [dict(layer) for layer in self.tokens_per_layer],
            "flops": self.flops.to_dict(),
            "kv_bytes": self.kv_bytes.to_dict(),
            "seconds": dict(self.seconds),
            "peak_bytes": self.peak_bytes,
        }


Run = Callable[[], tuple[Answer, ...]]  # answers requests that are prepared
Prepare = Callable[[Sequence[Request]], Run]


class Engine(ABC):
    """One way to run models."""

    provides: ClassVar[frozenset[Signal]]

    @property
    @abstractmethod
    def device(self) -> str:
        """Where the model runs: `cpu`, `cuda:0`, ..."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """What its weights are: `float32`, `bfloat16`, ..."""

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
        """Compile a plan for a model, and refuse, before any weights load, what this engine cannot do exactly.

        attention: what the model is about to be loaded with, if that is known. adapter: the model's; if None, the one
        for the architectures in its configuration.
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
    ) -> "Engine":
        """An engine with a model that is in a local folder or hub id, ready to run by a plan that `check` takes.

        device, dtype, attention: as `fastav.pipeline` takes them.
        Raises: CheckpointError; FastAVError for what cannot be used.
        """

    def close(self) -> None:
        """Give back at once what the engine holds outside of this process; it answers no more."""
        return

    @abstractmethod
    def generate(
        self,
        requests: Sequence[Request],
        plan: Plan,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        on_text: Callable[[str], None] | None = None,
    ) -> tuple[Answer, ...]:
        """Answer a batch of requests.

        on_text: called with each piece of the answer as it comes; for single requests only.
        Raises: MediaError, PlanError, UnsupportedPlan.
        """

    def preparer(self, plan: Plan, *, max_new_tokens: int = 128, sampling: Sampling = GREEDY) -> Prepare:
        """What prepares batches for a plan, so that less is left to do when it is their turn.

        It may be called in another thread than the one that answers, for one batch at a time, and raises what
        `generate` raises for these requests. What it returns is called once, or never. Here all is left to `generate`.
        Raises: PlanError, UnsupportedPlan for what no request could be answered with.
        """

        def prepare(requests: Sequence[Request]) -> Run:
            return partial(self.generate, requests, plan, max_new_tokens=max_new_tokens, sampling=sampling)

        return prepare

    def trace(self, request: Request, plan: Plan, *, alpha: float = ALPHA) -> Trace:
        """Look at the attention of one prefill under a plan, and at its rollout with this alpha.

        Raises: UnsupportedPlan if this engine does not show its attention; as `generate`.
        """
        raise UnsupportedPlan(f"{type(self).__name__} does not show its attention", "take the engine transformers")
