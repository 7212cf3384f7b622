"""Requests in, answers out, by vLLM in this process."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from transformers import PreTrainedConfig

from fastav.adapter import ModelAdapter, Request, adapter_for
from fastav.engine import GREEDY, Answer, Engine, Sampling
from fastav.engines.vllm import guards
from fastav.method import Signal
from fastav.plan import Plan


class VllmEngine(Engine):
    """vLLM with a plan."""

    provides: ClassVar[frozenset[Signal]] = frozenset(Signal) - {Signal.GIVEN, Signal.ENCODER}

    @classmethod
    def check(
        cls,
        config: PreTrainedConfig,
        plan: Plan,
        attention: str | None = None,
        *,
        adapter: ModelAdapter | None = None,
    ) -> None:
        """Refuse plans that cannot be carried out exactly inside vLLM."""
        named = adapter or adapter_for(config.architectures or (), config.to_dict())
        guards.check_plan(guards.Asked(plan=plan, adapter=named, config=getattr(config, "thinker_config", config)))

    def generate(
        self,
        requests: Sequence[Request],
        plan: Plan,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        on_text: Callable[[str], None] | None = None,
    ) -> tuple[Answer, ...]:
        """Answer a batch of requests."""
        raise NotImplementedError
