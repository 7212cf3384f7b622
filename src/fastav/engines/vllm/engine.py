"""Requests in, answers out, by vLLM's own continuous batching."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

from fastav.adapter import ModelAdapter, adapter_for
from fastav.decoding.stopping import Stop
from fastav.decoding.streaming import Stream
from fastav.device import validate_dtype
from fastav.engine import GREEDY, Answer, Engine, Prepare, Run, Sampling, Saving
from fastav.engines.vllm import compat, guards, offline
from fastav.engines.vllm.guards import PruningConfig
from fastav.engines.vllm.offline import Generation, Offline
from fastav.errors import FastAVError, PlanError
from fastav.flops import kv_bytes, prefill_flops
from fastav.layout import Layout
from fastav.method import Signal
from fastav.plan import Plan
from fastav.pruning.compiled import CompiledPlan
from fastav.request import Request
from fastav.sources import reachable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Requests after vLLM's processor.

    layouts: of their prompts. media: the seconds that decoding and processing took.
    """

    prompts: tuple[Any, ...]
    layouts: tuple[Layout, ...]
    media: float


class VllmEngine(Engine):
    """vLLM with a plan.

    llm: a `vllm.LLM` that was started with fastav in its `additional_config`, for settings of your own.
    """

    provides: ClassVar[frozenset[Signal]] = guards.PROVIDES

    def __init__(self, llm: Any) -> None:
        self._vllm = Offline(llm)
        self._pruning = self._vllm.pruning

    @classmethod
    def load(
        cls,
        adapter: ModelAdapter,
        source: str,
        plan: Plan,
        *,
        device: str | None = None,
        dtype: str | None = None,
        attention: str | None = None,
    ) -> "VllmEngine":
        """Start vLLM with its own defaults.

        device: `cpu` or `cuda`, for which vLLM must be built. attention: must be None, as vLLM chooses it.
        """
        if attention is not None:
            raise FastAVError(
                "vLLM chooses its attention itself", "leave attention out, or use the engine transformers"
            )
        compat.require_vllm()
        validate_dtype(dtype, auto=True)
        if device not in (None, available := compat.device_type()):
            raise FastAVError(
                f"this vLLM runs on {available}, not on {device}", "CUDA_VISIBLE_DEVICES selects one of several GPUs"
            )
        return cls(offline.start(reachable(source, adapter.revision), plan, dtype))

    @property
    def device(self) -> str:
        """The kind of device that the model runs on."""
        return compat.device_type()

    @property
    def dtype(self) -> str:
        """The dtype of the weights."""
        return self._vllm.dtype

    def close(self) -> None:
        """End vLLM's processes."""
        self._vllm.close()

    @classmethod
    def check(
        cls,
        config: PreTrainedConfig,
        plan: Plan,
        attention: str | None = None,
        *,
        adapter: ModelAdapter | None = None,
    ) -> CompiledPlan:
        """Compile a plan for this model, and refuse what cannot be exact inside vLLM."""
        adapter = adapter or adapter_for(config.architectures or (), config.to_dict())
        pruning = PruningConfig(plan=plan, adapter=adapter, config=getattr(config, "thinker_config", config))
        guards.check_plan(pruning)
        return pruning.compiled

    def generate(
        self,
        requests: Sequence[Request],
        plan: Plan,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        on_text: Callable[[str], None] | None = None,
    ) -> tuple[Answer, ...]:
        """Answer requests at the same time, with the penalties of the model's generation config."""
        params = self._params(plan, max_new_tokens, sampling, stream=on_text is not None and len(requests) == 1)
        return self._answers(self._batch(requests, max_new_tokens), plan, params, sampling, on_text)

    def preparer(self, plan: Plan, *, max_new_tokens: int = 128, sampling: Sampling = GREEDY) -> Prepare:
        """A function that decodes a batch and runs vLLM's processor on it, in any thread."""
        params = self._params(plan, max_new_tokens, sampling)

        def prepare(requests: Sequence[Request]) -> Run:
            return partial(self._answers, self._batch(requests, max_new_tokens), plan, params, sampling)

        return prepare

    def _params(self, plan: Plan, max_new_tokens: int, sampling: Sampling, *, stream: bool = False) -> Any:
        """Raises: PlanError, UnsupportedPlan, FastAVError."""
        self.check(self._pruning.config, plan, adapter=self._pruning.adapter)
        if max_new_tokens < 1:
            raise PlanError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        return self._vllm.params(sampling, max_new_tokens, plan, stream=stream)

    def _batch(self, requests: Sequence[Request], max_new_tokens: int) -> _Batch:
        """Raises: MediaError, FastAVError for prompts that are too long."""
        start = time.perf_counter()
        adapter, prompts, layouts = self._pruning.adapter, [], []
        for request in requests:
            prompt = self._vllm.render(adapter.vllm_inputs(self._vllm.processor, request))
            (layout,) = adapter.layouts(self._pruning.config, self._vllm.layout_inputs(prompt))
            self._require_room(len(layout), max_new_tokens)
            prompts.append(prompt)
            layouts.append(layout)
        return _Batch(prompts=tuple(prompts), layouts=tuple(layouts), media=time.perf_counter() - start)

    def _require_room(self, prompt_tokens: int, max_new_tokens: int) -> None:
        if prompt_tokens + max_new_tokens > (limit := self._vllm.max_model_len):
            raise FastAVError(
                f"a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones exceed vLLM's limit of {limit}",
                "ask for a shorter answer, or about less of the clip",
            )

    def _answers(
        self,
        batch: _Batch,
        plan: Plan,
        params: Any,
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
    ) -> tuple[Answer, ...]:
        processor: Any = self._vllm.processor
        stop = Stop(processor.tokenizer, sampling.stop)
        stream = Stream(processor.tokenizer, on_text, stop) if on_text and len(batch.prompts) == 1 else None
        generations = self._vllm.generate(batch.prompts, params, None if stream is None else _token_sink(stream))
        if stream is not None:
            stream.end()
        return tuple(
            self._answer(layout, plan, stop, generation, {"media": batch.media} | _seconds(generation.metrics))
            for layout, generation in zip(batch.layouts, generations, strict=True)
        )

    def _answer(
        self, layout: Layout, plan: Plan, stop: Stop, generation: Generation, seconds: dict[str, float]
    ) -> Answer:
        shape, itemsize = self._pruning.adapter.shape(self._pruning.config), self._vllm.itemsize
        full, kept = [len(layout)] * shape.layers, plan.tokens(layout, shape.layers)
        tokens, end_tokens = generation.tokens, set(self._vllm.end_tokens)
        length = next((index for index, token in enumerate(tokens) if token in end_tokens), len(tokens))
        token_ids, text, stopped = stop.cut(tokens[:length])
        return Answer(
            text=text.strip(),
            token_ids=tuple(token_ids),
            finish="stop" if length < len(tokens) or stopped else "length",
            plan=plan.name or plan.fingerprint,
            prompt_tokens=layout.by_modality(),
            tokens_per_layer=tuple(plan.by_layer(layout, shape.layers)),
            flops=Saving(prefill_flops(shape, full), prefill_flops(shape, kept)),
            kv_bytes=Saving(kv_bytes(shape, full, itemsize), kv_bytes(shape, kept, itemsize)),
            seconds=seconds,
            peak_bytes=None,
        )


def _token_sink(stream: Stream) -> Callable[[Sequence[int]], None]:
    """A function that puts tokens into a stream one by one."""
    stream.put(torch.empty(0, dtype=torch.long))  # the prompt, which `generate` of transformers puts first

    def put(tokens: Sequence[int]) -> None:
        for token in tokens:
            stream.put(torch.tensor([token]))

    return put


def _seconds(metrics: Any) -> dict[str, float]:
    """The seconds of a request's prefill and of its decoding, if vLLM recorded them."""
    if metrics is None:
        return {}
    first = metrics.first_token_ts
    return {"prefill": first - metrics.scheduled_ts, "decode": metrics.last_token_ts - first}
