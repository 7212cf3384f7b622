"""Requests in, answers out, by vLLM's own continuous batching."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

from fastav.adapter import ModelAdapter, Prepared, adapter_for
from fastav.decoding.settings import GenerationSettings, resolve_settings
from fastav.decoding.stopping import Stop
from fastav.decoding.streaming import Stream
from fastav.device import validate_dtype
from fastav.engine import Answer, Engine, Listener, Prepare, Run, only_listener
from fastav.engines.vllm import compat, guards, offline
from fastav.engines.vllm.guards import PruningConfig
from fastav.engines.vllm.offline import Generation, Offline
from fastav.engines.vllm.sampling import sampling_arguments
from fastav.errors import FastAVError
from fastav.flops import Saving, kv_bytes, prefill_flops
from fastav.layout import Layout
from fastav.method import Signal
from fastav.plan import Plan
from fastav.pruning.compiled import CompiledPlan
from fastav.request import Request
from fastav.request_lock import Cancellation
from fastav.sources import reachable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Requests after vLLM's processor.

    layouts: of their prompts. media: the seconds that decoding and processing took.
    """

    prompts: tuple[Any, ...]
    layouts: tuple[Layout, ...]
    media: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """A call with checked settings.

    arguments: vLLM's, besides the maximum length. is_stream: whether the answer is to come in pieces.
    """

    plan: Plan
    settings: GenerationSettings
    arguments: Mapping[str, Any]
    is_stream: bool


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
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> "VllmEngine":
        """Start vLLM with its own defaults.

        device: `cpu` or `cuda`, for which vLLM must be built. attention: must be None, as vLLM chooses it.
        model_kwargs: more arguments of `vllm.LLM`.
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
        revision = (model_kwargs or {}).get("revision", adapter.revision)
        return cls(offline.start(reachable(source, revision), plan, dtype, model_kwargs))

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
        on_text: Callable[[str], None] | None = None,
        cancellation: Cancellation | None = None,
        **settings: Any,
    ) -> tuple[Answer, ...]:
        """Answer requests at the same time.  settings: those of `generate` that vLLM has, under the same names."""
        is_stream = on_text is not None and len(requests) == 1
        call = self._call(plan, settings, stream=is_stream)
        return self._answers(self._batch(requests, call), call, on_text if is_stream else None, cancellation)

    def preparer(self, plan: Plan, **settings: Any) -> Prepare:
        """A function that decodes a batch and runs vLLM's processor on it, in any thread."""
        call = self._call(plan, settings)

        def prepare(requests: Sequence[Request], prepared: Prepared | None = None) -> Run:
            batch = self._batch(requests, call)

            def run(listeners: Sequence[Listener] = ()) -> tuple[Answer, ...]:
                one = only_listener(listeners)
                listening = replace(call, is_stream=one.on_text is not None)
                return self._answers(batch, listening, one.on_text, one.cancellation)

            return run

        return prepare

    def _call(self, plan: Plan, settings: Mapping[str, Any], *, stream: bool = False) -> _Call:
        """Raises: PlanError, UnsupportedPlan, FastAVError."""
        self.check(self._pruning.config, plan, adapter=self._pruning.adapter)
        resolved = resolve_settings(settings, self._vllm.generation_config)
        return _Call(plan=plan, settings=resolved, arguments=sampling_arguments(resolved), is_stream=stream)

    def _batch(self, requests: Sequence[Request], call: _Call) -> _Batch:
        """Raises: MediaError, FastAVError for prompts that are too long."""
        start = time.perf_counter()
        adapter, prompts, layouts = self._pruning.adapter, [], []
        for request in requests:
            prompt = self._vllm.render(adapter.vllm_inputs(self._vllm.processor, request))
            (layout,) = adapter.layouts(self._pruning.config, self._vllm.layout_inputs(prompt))
            self._require_room(len(layout), call.settings.new_tokens(len(layout)))
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
        call: _Call,
        on_text: Callable[[str], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> tuple[Answer, ...]:
        processor: Any = self._vllm.processor
        stop = Stop(processor.tokenizer, call.settings.stop_texts)
        stream = None if on_text is None else Stream(processor.tokenizer, on_text, stop, cancellation)
        lengths = [call.settings.new_tokens(len(layout)) for layout in batch.layouts]
        params = [self._vllm.params(call.arguments, n, call.plan, stream=call.is_stream) for n in lengths]
        on_tokens = None if stream is None else _token_sink(stream)
        generations = self._vllm.generate(batch.prompts, params, on_tokens, cancellation)
        if stream is not None:
            stream.end()
        return tuple(
            self._answer(layout, call, stop, generation, {"media": batch.media} | _seconds(generation.metrics))
            for layout, generation in zip(batch.layouts, generations, strict=True)
        )

    def _answer(
        self, layout: Layout, call: _Call, stop: Stop, generation: Generation, seconds: dict[str, float]
    ) -> Answer:
        shape, itemsize = self._pruning.adapter.shape(self._pruning.config), self._vllm.itemsize
        plan, tokens, end_tokens = call.plan.for_decoder(shape), generation.tokens, set(call.settings.end_tokens)
        full, kept = [len(layout)] * shape.layers, plan.tokens(layout, shape.layers)
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
