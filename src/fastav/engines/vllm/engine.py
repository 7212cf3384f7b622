"""Requests in, answers out, by vLLM's own continuous batching."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

from fastav.adapter import ModelAdapter, Request, adapter_for
from fastav.decoding.stopping import Stop
from fastav.decoding.streaming import Stream
from fastav.device import known_dtype
from fastav.engine import GREEDY, Answer, Engine, Prepare, Run, Sampling, Saving
from fastav.engines.vllm import guards, offline
from fastav.engines.vllm.offline import Offline, Said
from fastav.errors import FastAVError, PlanError
from fastav.flops import kv_bytes, prefill_flops
from fastav.layout import Layout
from fastav.method import Signal
from fastav.plan import Plan
from fastav.pruning.compiled import CompiledPlan
from fastav.sources import reachable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Requests that vLLM's processor has seen.

    layouts: of their prompts. media: seconds that took.
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
        self._asked = self._vllm.asked

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
        """vLLM with its own defaults.

        device: `cpu` or `cuda`, whichever vLLM was built for. attention: vLLM chooses.
        """
        if attention is not None:
            raise FastAVError(
                "vLLM chooses its attention itself", "leave attention out, or take the engine transformers"
            )
        offline.imported()
        known_dtype(dtype, auto=True)
        if device not in (None, there := offline.platform()):
            raise FastAVError(
                f"this vLLM runs on {there}, not on {device}", "CUDA_VISIBLE_DEVICES says which of several GPUs"
            )
        return cls(offline.start(reachable(source, adapter.revision), plan, dtype))

    @property
    def device(self) -> str:
        """Where the model runs."""
        return offline.platform()

    @property
    def dtype(self) -> str:
        """What its weights are."""
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
        asked = guards.Asked(plan=plan, adapter=adapter, config=getattr(config, "thinker_config", config))
        guards.check_plan(asked)
        return asked.compiled

    def generate(
        self,
        requests: Sequence[Request],
        plan: Plan,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        on_text: Callable[[str], None] | None = None,
    ) -> tuple[Answer, ...]:
        """Answer requests, all at once; what the model's generation config says of penalties holds."""
        params = self._params(plan, max_new_tokens, sampling, piecewise=on_text is not None and len(requests) == 1)
        return self._answers(self._batch(requests, max_new_tokens), plan, params, sampling, on_text)

    def preparer(self, plan: Plan, *, max_new_tokens: int = 128, sampling: Sampling = GREEDY) -> Prepare:
        """What decodes batches and has vLLM's processor see them, in any thread."""
        params = self._params(plan, max_new_tokens, sampling)

        def prepare(requests: Sequence[Request]) -> Run:
            return partial(self._answers, self._batch(requests, max_new_tokens), plan, params, sampling)

        return prepare

    def _params(self, plan: Plan, new: int, sampling: Sampling, *, piecewise: bool = False) -> Any:
        """Raises: PlanError, UnsupportedPlan, FastAVError."""
        self.check(self._asked.config, plan, adapter=self._asked.adapter)
        if new < 1:
            raise PlanError(f"max_new_tokens must be at least 1, got {new}")
        return self._vllm.params(sampling, new, plan, piecewise=piecewise)

    def _batch(self, requests: Sequence[Request], new: int) -> _Batch:
        """Raises: MediaError, FastAVError for prompts that are too long."""
        start = time.perf_counter()
        prompts, layouts = [], []
        for request in requests:
            ready = self._vllm.rendered(self._asked.adapter.prompt(self._vllm.processor, request))
            (layout,) = self._asked.adapter.layouts(self._asked.config, self._vllm.inputs(ready))
            self._require_room(len(layout), new)
            prompts.append(ready)
            layouts.append(layout)
        return _Batch(prompts=tuple(prompts), layouts=tuple(layouts), media=time.perf_counter() - start)

    def _require_room(self, prompt: int, new: int) -> None:
        if prompt + new > (longest := self._vllm.longest):
            raise FastAVError(
                f"a prompt of {prompt} tokens and {new} new ones exceed the {longest} that vLLM has room for",
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
        said = self._vllm.answered(batch.prompts, params, None if stream is None else _pieces(stream))
        if stream is not None:
            stream.end()
        return tuple(
            self._answer(layout, plan, stop, one, {"media": batch.media} | _seconds(one.metrics))
            for layout, one in zip(batch.layouts, said, strict=True)
        )

    def _answer(self, layout: Layout, plan: Plan, stop: Stop, said: Said, seconds: dict[str, float]) -> Answer:
        shape, itemsize = self._asked.adapter.shape(self._asked.config), self._vllm.itemsize
        full, kept = [len(layout)] * shape.layers, plan.tokens(layout, shape.layers)
        ends = set(self._vllm.ends)
        length = next((at for at, token in enumerate(said.tokens) if token in ends), len(said.tokens))
        new, text, stopped = stop.cut(said.tokens[:length])
        return Answer(
            text=text.strip(),
            token_ids=tuple(new),
            finish="stop" if length < len(said.tokens) or stopped else "length",
            plan=plan.name or plan.fingerprint,
            prompt_tokens=layout.by_modality(),
            tokens_per_layer=tuple(plan.by_layer(layout, shape.layers)),
            flops=Saving(prefill_flops(shape, full), prefill_flops(shape, kept)),
            kv_bytes=Saving(kv_bytes(shape, full, itemsize), kv_bytes(shape, kept, itemsize)),
            seconds=seconds,
            peak_bytes=None,
        )


def _pieces(stream: Stream) -> Callable[[Sequence[int]], None]:
    """What hands tokens to a stream, one by one as it wants them."""
    stream.put(torch.empty(0, dtype=torch.long))  # where generate hands over the prompt

    def put(tokens: Sequence[int]) -> None:
        for token in tokens:
            stream.put(torch.tensor([token]))

    return put


def _seconds(metrics: Any) -> dict[str, float]:
    """When a request ran, if vLLM tells: from its first step to its first token, and on to its last."""
    if metrics is None:
        return {}
    first = metrics.first_token_ts
    return {"prefill": first - metrics.scheduled_ts, "decode": metrics.last_token_ts - first}
