"""The engine that answers requests with a transformers model."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import ModelAdapter, Prepared, adapter_for
from fastav.decoding.stopping import Stop
from fastav.decoding.streaming import Stream
from fastav.device import resolve_device, validate_attention
from fastav.engine import GREEDY, Answer, Engine, Prepare, Run, Sampling, Saving
from fastav.engines.transformers import guards
from fastav.engines.transformers.devices import input_device, running_on
from fastav.engines.transformers.generation.loop import Decoding, release_steps
from fastav.engines.transformers.generation.sampler import generate_settings
from fastav.engines.transformers.hooks import prune
from fastav.engines.transformers.prefetch import EncodedBatch, EncoderPrefetcher, on_device
from fastav.engines.transformers.timing import PeakMemory, Phases
from fastav.engines.transformers.tracing import trace
from fastav.errors import FastAVError, PlanError
from fastav.flops import kv_bytes, prefill_flops
from fastav.installation import require_packages
from fastav.method import Signal
from fastav.plan import Plan
from fastav.pruning.compiled import CompiledPlan, compile_plan
from fastav.pruning.rollout import ALPHA
from fastav.request import Request
from fastav.request_lock import RequestLock
from fastav.sources import reachable
from fastav.trace import Trace

MAX_PLANS = 64  # compiled plans to keep for each engine


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Requests after decoding and tokenization.

    media: seconds of that work. encoded: the encoders' outputs, if the encoders have run.
    """

    prepared: Prepared
    media: float
    encoded: EncodedBatch | None = None


class TransformersEngine(Engine):
    """A loaded model with its processor and adapter.  It answers one batch at a time; other threads wait.

    encode_ahead: whether the encoders of the next batch run while the current one is answered, which needs free memory
    on the device; None to do so only on a CUDA device, where they run in another stream. Answers are the same.
    """

    provides: ClassVar[frozenset[Signal]] = frozenset(Signal) - {Signal.GIVEN}

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        adapter: ModelAdapter,
        *,
        encode_ahead: bool | None = None,
    ) -> None:
        self.model, self.processor, self.adapter = model, processor, adapter
        self._encode_ahead = encode_ahead
        self._answering, self._preparing = RequestLock(), Lock()
        self._compiling, self._plans = Lock(), dict[str, CompiledPlan]()  # by the plan's JSON, as plans can be changed

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
    ) -> "TransformersEngine":
        """Load a model of transformers, or of fastav, onto a device."""
        target, dtype = resolve_device(device, dtype, auto=True)
        require_packages(adapter.name, adapter.packages, "transformers")  # before any network access
        source = reachable(source, adapter.revision)
        options: dict[str, Any] = {"dtype": getattr(torch, dtype, dtype)}
        if attention is not None:
            options["attn_implementation"] = validate_attention(attention)
        model: Any
        model, processor = adapter.load(source, **options)
        return cls(model.to(target), processor, adapter)

    @property
    def device(self) -> str:
        """The device that the model takes its inputs on."""
        return str(input_device(self.model))

    @property
    def dtype(self) -> str:
        """The type of the model's weights."""
        return str(self.model.dtype).removeprefix("torch.")

    @classmethod
    def check(
        cls,
        config: PreTrainedConfig,
        plan: Plan,
        attention: str | None = None,
        *,
        adapter: ModelAdapter | None = None,
    ) -> CompiledPlan:
        """Compile a plan for a model, and refuse a plan that cannot be exact in it."""
        adapter = adapter or adapter_for(config.architectures or (), config.to_dict())
        compiled = cls._compile(config.get_text_config(decoder=True), plan, adapter)
        if attention is not None and compiled.first_layer < compiled.depth:
            guards.check_attention(compiled.config, attention, compiled.first_layer)
        return compiled

    @classmethod
    def _compile(cls, decoder: PreTrainedConfig, plan: Plan, adapter: ModelAdapter) -> CompiledPlan:
        """Compile a plan for a decoder's configuration.  Raises: PlanError, UnsupportedModel, UnsupportedPlan."""
        compiled = compile_plan(plan, decoder, adapter)
        if missing := compiled.needs - cls.provides:
            method = next(method for method in compiled.methods if method.needs & missing)
            raise PlanError(
                f"the plan has a step with the method {compiled.name_of(method)!r}, whose scores only a caller can "
                "pass",
                "prune the model yourself: fastav.prune(model, plan, scores=...)",
            )
        return compiled

    def generate(
        self,
        requests: Sequence[Request],
        plan: Plan,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        on_text: Callable[[str], None] | None = None,
    ) -> tuple[Answer, ...]:
        """Answer a batch of requests, with the penalties of the model's generation config.

        The tokens are those of the model's own `generate`, chosen by `fastav.Decoding`.
        """
        compiled = self._checked(plan, max_new_tokens)
        return self._answer_batch(self._batch(requests, max_new_tokens), compiled, max_new_tokens, sampling, on_text)

    def preparer(self, plan: Plan, *, max_new_tokens: int = 128, sampling: Sampling = GREEDY) -> Prepare:
        """Return a function that decodes and tokenizes a batch, in any thread, and runs its encoders if configured."""
        compiled = self._checked(plan, max_new_tokens)
        with self._answering:  # a model must not be copied while it answers
            prefetcher = EncoderPrefetcher(self.model, self.adapter) if self._encodes_ahead(compiled) else None

        def prepare(requests: Sequence[Request]) -> Run:
            batch = self._batch(requests, max_new_tokens)
            if prefetcher is not None:
                with suppress(torch.OutOfMemoryError):  # memory may be free again when it is this batch's turn
                    batch = replace(batch, encoded=prefetcher.encode(batch.prepared.inputs))
            return partial(self._answer_batch, batch, compiled, max_new_tokens, sampling)

        return prepare

    @torch.inference_mode()
    def trace(self, request: Request, plan: Plan, *, alpha: float = ALPHA) -> Trace:
        """Record the attention of one prefill.  The host holds the queries and keys of all layers meanwhile."""
        compiled = self._compiled(plan)
        prepared = self._prepared([request])
        self._require_room(len(prepared.layouts[0]), 1)
        inputs = on_device(prepared.inputs, self.model)
        with self._answering:
            return trace(self.model, compiled, inputs, prepared.layouts[0], alpha)

    def _compiled(self, plan: Plan) -> CompiledPlan:
        """Compile a plan for the loaded model, once.  Raises: PlanError, UnsupportedModel, UnsupportedPlan."""
        key = plan.to_json()
        with self._compiling:
            if key not in self._plans:
                decoder: Any = self.adapter.decoder(self.adapter.language_model(self.model))
                compiled = self._compile(decoder.config, plan, self.adapter)
                while len(self._plans) >= MAX_PLANS:
                    del self._plans[next(iter(self._plans))]
                self._plans[key] = compiled
            return self._plans[key]

    def _checked(self, plan: Plan, max_new_tokens: int) -> CompiledPlan:
        """The compiled plan, with arguments checked.  Raises: PlanError, UnsupportedModel, UnsupportedPlan."""
        compiled = self._compiled(plan)
        if max_new_tokens < 1:
            raise PlanError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        return compiled

    def _encodes_ahead(self, compiled: CompiledPlan) -> bool:
        """Whether encoders run ahead: if configured, and if no method reads their attention."""
        is_on = input_device(self.model).type == "cuda" if self._encode_ahead is None else self._encode_ahead
        return (
            is_on and Signal.ENCODER not in compiled.needs and EncoderPrefetcher.is_supported(self.model, self.adapter)
        )

    def _batch(self, requests: Sequence[Request], max_new_tokens: int) -> _Batch:
        """Decode and tokenize requests.  Raises: MediaError, FastAVError for prompts that are too long."""
        start = time.perf_counter()
        prepared = self._prepared(requests)
        self._require_room(max(map(len, prepared.layouts)), max_new_tokens)
        return _Batch(prepared=prepared, media=time.perf_counter() - start)

    def _answer_batch(
        self,
        batch: _Batch,
        compiled: CompiledPlan,
        max_new_tokens: int,
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
    ) -> tuple[Answer, ...]:
        """Answer a batch; if memory runs out, free captured steps and try once more."""
        try:
            with self._answering:
                return self._generate(batch, compiled, max_new_tokens, sampling, on_text)
        except torch.OutOfMemoryError:
            if not release_steps(self.model):
                raise
        with self._answering:
            return self._generate(replace(batch, encoded=None), compiled, max_new_tokens, sampling, on_text)

    @torch.inference_mode()
    def _generate(
        self,
        batch: _Batch,
        compiled: CompiledPlan,
        max_new_tokens: int,
        sampling: Sampling,
        on_text: Callable[[str], None] | None,
    ) -> tuple[Answer, ...]:
        prepared, encoded, encoders = batch.prepared, batch.encoded, self.adapter.encoders(self.model)
        inputs = on_device(prepared.inputs, self.model) if encoded is None else encoded.inputs
        tokenizer: Any = getattr(self.processor, "tokenizer", None)
        stop = Stop(tokenizer, sampling.stop)
        streamer = Stream(tokenizer, on_text, stop) if on_text and len(prepared.layouts) == 1 else None
        device = input_device(self.model)
        phases, memory = Phases(device), PeakMemory(*running_on(self.model))
        with (
            prune(self.model, compiled, layouts=prepared.layouts) as pruning,
            nullcontext() if encoded is None else encoded.replay(encoders),
            phases.timing(self.model, encoders),
            _seeded(sampling.seed, device),
        ):
            ids: Any = self.model.generate(  # pyright: ignore[reportCallIssue]
                **inputs,
                **generate_settings(sampling),
                max_new_tokens=max_new_tokens,
                custom_generate=Decoding(self.adapter, streamer=streamer, stop=stop),
            )
        seconds = {"media": batch.media} | phases.seconds()
        if encoded is not None:
            seconds["encode"] += encoded.seconds()
        new_ids, layer_tokens = ids[:, inputs["input_ids"].shape[1] :], pruning.tokens()
        return tuple(
            self._answer(prepared, compiled.plan, stop, row, new_ids[row], layer_tokens[row], seconds, memory.bytes())
            for row in range(len(prepared.layouts))
        )

    def _prepared(self, requests: Sequence[Request]) -> Prepared:
        """The inputs of requests, made by one thread at a time: fast tokenizers hold their padding as state."""
        with self._preparing:
            return self.adapter.prepare(self.processor, requests)

    def _require_room(self, prompt: int, new: int) -> None:
        config: Any = self.model.config.get_text_config(decoder=True)
        if prompt + new > config.max_position_embeddings:
            raise FastAVError(
                f"a prompt of {prompt} tokens and {new} new ones exceed the model's {config.max_position_embeddings}",
                "ask for a shorter answer, or about a shorter part of the clip",
            )

    def _answer(
        self,
        prepared: Prepared,
        plan: Plan,
        stop: Stop,
        row: int,
        ids: Tensor,
        layer_tokens: Sequence[dict[str, int]],
        seconds: dict[str, float],
        peak: int | None,
    ) -> Answer:
        layout, shape = prepared.layouts[row], self.adapter.shape(self.model.config)
        full = [len(layout)] * shape.layers
        pruned = [sum(layer.values()) for layer in layer_tokens]
        stored, itemsize = plan.cache_tokens(layout, shape.layers), self.model.dtype.itemsize
        tokens, ended = self._until_end(ids.tolist())
        tokens, text, stopped = stop.cut(tokens)
        return Answer(
            text=text.strip(),
            token_ids=tuple(tokens),
            finish="stop" if ended or stopped else "length",
            plan=plan.name or plan.fingerprint,
            prompt_tokens=layout.by_modality(),
            tokens_per_layer=tuple(layer_tokens),
            flops=Saving(prefill_flops(shape, full), prefill_flops(shape, pruned)),
            kv_bytes=Saving(kv_bytes(shape, full, itemsize), kv_bytes(shape, stored, itemsize)),
            seconds=seconds,
            peak_bytes=peak,
        )

    def _until_end(self, ids: list[int]) -> tuple[list[int], bool]:
        """The tokens before the end marker, and whether there is one."""
        end = self.model.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
        ends = set(end) if isinstance(end, list) else {end}
        length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        return ids[:length], length < len(ids)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch's generators, and restore their state afterwards.  None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
