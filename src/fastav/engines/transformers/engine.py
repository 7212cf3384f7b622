"""The engine that answers requests with a transformers model."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import ModelAdapter, Prepared, PreparedTurn, Transcript, adapter_for, plan_named
from fastav.decoding.settings import greedy_settings
from fastav.decoding.stopping import Stop
from fastav.decoding.streaming import BatchStream
from fastav.device import resolve_device, validate_attention
from fastav.engine import Answer, Conversation, Engine, Listener, Prepare, Run
from fastav.engines.transformers import guards, loaded
from fastav.engines.transformers.conversation import CachedConversation
from fastav.engines.transformers.devices import input_device, running_on
from fastav.engines.transformers.generation.call import Call, checked_call, seeded, until_end
from fastav.engines.transformers.generation.loop import release_steps
from fastav.engines.transformers.hooks import prune
from fastav.engines.transformers.inspecting import CutRecorder, token_texts
from fastav.engines.transformers.prefetch import EncodedBatch, EncoderPrefetcher, on_device
from fastav.engines.transformers.scoring import forced_logits
from fastav.engines.transformers.timing import PeakMemory, Phases
from fastav.engines.transformers.tracing import trace
from fastav.errors import FastAVError, PlanError
from fastav.flops import Saving, kv_bytes, prefill_flops
from fastav.formatting import plural
from fastav.inspection import Inspection
from fastav.installation import require_packages
from fastav.layout import Layout
from fastav.method import ENCODER_SIGNALS, Signal
from fastav.plan import Plan
from fastav.pruning.compiled import CompiledPlan, compile_plan
from fastav.pruning.rollout import ALPHA
from fastav.request import Request
from fastav.request_lock import Cancellation, JointCancellation, RequestLock
from fastav.retention import dropped_ends
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
        part = adapter.language_model(model)
        self.model, self.processor, self.adapter = part, processor, adapter
        self._whole = model  # of which `self.model` is the part that writes text
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
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> "TransformersEngine":
        """Load a model of transformers, or of fastav, onto a device.

        model_kwargs: of `from_pretrained`; with `device_map`, these say where the model goes.
        """
        options = dict(model_kwargs or {})
        target, dtype = resolve_device(device, dtype, auto=True)
        require_packages(adapter.name, adapter.packages, "transformers")  # before any network access
        if not options.get("local_files_only"):
            source = reachable(source, options.get("revision", adapter.revision))
        options["dtype"] = getattr(torch, dtype, dtype)
        if attention is not None:
            options["attn_implementation"] = validate_attention(attention)
        if options.get("quantization_config") is not None:
            options.setdefault("device_map", {"": target})  # as quantized weights cannot be moved
        model: Any
        with loaded.as_load_error(source, options):
            model, processor = adapter.load(source, **options)
        if options.get("device_map") is None:
            model = loaded.moved(model, target, is_required=device is not None)
        return cls(model, processor, adapter)

    @classmethod
    def from_model(cls, model: Any, processor: Any, plan: Plan | str) -> tuple[Engine, Plan, ModelAdapter]:
        """An engine for a loaded model, the plan, checked for it, and the model's adapter."""
        model, adapter = loaded.usable(model)
        resolved = plan_named(plan, adapter)
        config: Any = adapter.decoder(adapter.language_model(model)).config
        cls.check(config, resolved, config._attn_implementation, adapter=adapter)
        return cls(model, loaded.processor_for(model, adapter, processor), adapter), resolved, adapter

    @property
    def device(self) -> str:
        """The device that the model takes its inputs on."""
        return str(input_device(self.model))

    @property
    def generation_config(self) -> GenerationConfig:
        """The generation config of the model; of one that also speaks, its thinker may lack some of it."""
        part: Any = self.model.generation_config
        if self._whole is self.model:
            return part
        config = GenerationConfig()
        for source in (part, self._whole.generation_config):
            for name, value in vars(source).items():
                if value is not None:
                    setattr(config, name, value)
        return config

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
            method = next(method for method in compiled.methods if compiled.signals_of(method) & missing)
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
        on_text: Callable[[str], None] | None = None,
        cancellation: Cancellation | None = None,
        **settings: Any,
    ) -> tuple[Answer, ...]:
        """Answer a batch of requests.  The tokens are those of the model's own `generate` with these settings.

        `fastav.Decoding` chooses them where it gives the same tokens (docs/decoding.md), else transformers' own loop.
        """
        compiled = self._compiled(plan)
        streams = on_text is not None and len(requests) == 1
        call = checked_call(settings, self.generation_config, streams=streams)
        batch = self._batch(requests, call)
        listener = Listener(on_text=on_text, cancellation=cancellation)
        return self._answer_batch(batch, compiled, call, [listener] if streams else ())

    def preparer(self, plan: Plan, **settings: Any) -> Prepare:
        """Return a function that decodes and tokenizes a batch, in any thread, and runs its encoders if configured."""
        compiled, call = self._compiled(plan), checked_call(settings, self.generation_config)
        with self._answering:  # a model must not be copied while it answers
            prefetcher = EncoderPrefetcher(self.model, self.adapter) if self._encodes_ahead(compiled) else None

        def prepare(requests: Sequence[Request], prepared: Prepared | None = None) -> Run:
            batch = self._batch(requests, call, prepared)
            if prefetcher is not None:
                with suppress(torch.OutOfMemoryError):  # memory may be free again when it is this batch's turn
                    batch = replace(batch, encoded=prefetcher.encode(batch.prepared.inputs))
            return partial(self._answer_batch, batch, compiled, call)

        return prepare

    @torch.inference_mode()
    def trace(self, request: Request, plan: Plan, *, alpha: float = ALPHA) -> Trace:
        """Record the attention of one prefill.  The host holds the queries and keys of all layers meanwhile."""
        compiled = self._compiled(plan)
        prepared = self._prepared([request])
        self.require_room(len(prepared.layouts[0]), 1)
        inputs = on_device(prepared.inputs, self.model)
        with self._answering:
            return trace(self.model, compiled, inputs, prepared.layouts[0], alpha)

    @torch.inference_mode()
    def inspect(self, request: Request, plan: Plan) -> Inspection:
        """Record what every cut of one prefill drops.  The prefill is that of a greedy answer of one token."""
        compiled, recorder = self._compiled(plan), CutRecorder()
        call = checked_call({**greedy_settings(), "max_new_tokens": 1, "min_new_tokens": None}, self.generation_config)
        prepared = self._batch([request], call).prepared
        layout, tokenizer = prepared.layouts[0], getattr(self.processor, "tokenizer", None)
        defaults, inputs = self.generation_config, on_device(prepared.inputs, self.model)
        ids = inputs["input_ids"]
        arguments = call.arguments(defaults, self.adapter, Stop(tokenizer, ()), None, prompt=ids.shape[1])
        with (
            self._answering,
            guards.patched(self.model, "generation_config", defaults),
            prune(self.model, compiled, layouts=prepared.layouts) as pruning,
            pruning.record_cuts(recorder),
        ):
            self.model.generate(**inputs, **arguments)  # pyright: ignore[reportCallIssue]
        flops, cache = self._costs(layout, plan, pruning.tokens()[0])
        return Inspection(
            model=self.adapter.name,
            plan=plan,
            depth=compiled.depth,
            layout=layout,
            cuts=tuple(recorder.cuts),
            texts=token_texts(tokenizer, ids[0].cpu().numpy(), layout),
            flops=flops,
            kv_bytes=cache,
        )

    @torch.inference_mode()
    def forced_logits(
        self, requests: Sequence[Request], plan: Plan, answers: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "steps vocabulary"], ...]:
        """The logits of the next token along given answers, by the same prefill and decoding steps as `generate`."""
        if len(answers) != len(requests):
            raise FastAVError(
                f"{plural(len(answers), 'answer')} for {plural(len(requests), 'request')}", "give one each"
            )
        compiled, prepared = self._compiled(plan), self._prepared(requests)
        self.require_room(max(map(len, prepared.layouts)), max(map(len, answers)))
        with self._answering:
            return forced_logits(self.model, compiled, prepared, answers)

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

    def _encodes_ahead(self, compiled: CompiledPlan) -> bool:
        """Whether encoders run ahead: if configured, and if no method reads their attention."""
        is_on = input_device(self.model).type == "cuda" if self._encode_ahead is None else self._encode_ahead
        if not is_on or compiled.needs & ENCODER_SIGNALS:
            return False
        return EncoderPrefetcher.is_supported(self.model, self.adapter)

    def _batch(self, requests: Sequence[Request], call: Call, prepared: Prepared | None = None) -> _Batch:
        """Decode and tokenize requests, unless `prepared`.  Raises: MediaError, FastAVError for prompts too long."""
        start = time.perf_counter()
        prepared = self._prepared(requests) if prepared is None else prepared
        longest = max(map(len, prepared.layouts))
        self.require_room(longest, call.settings.new_tokens(longest))
        return _Batch(prepared=prepared, media=time.perf_counter() - start)

    def _answer_batch(
        self,
        batch: _Batch,
        compiled: CompiledPlan,
        call: Call,
        listeners: Sequence[Listener] = (),
    ) -> tuple[Answer, ...]:
        """Answer a batch; if memory runs out, free captured steps and try once more.

        listeners: one per request, or none at all.
        """
        if any(listener.on_text is not None for listener in listeners):
            call.check_streams()
        cancellation = JointCancellation([one.cancellation for one in listeners]) if listeners else None
        try:
            with self._answering.turn(cancellation):
                return self._generate(batch, compiled, call, listeners)
        except torch.OutOfMemoryError:
            if not release_steps(self.model):
                raise
        with self._answering.turn(cancellation):
            return self._generate(replace(batch, encoded=None), compiled, call, listeners)

    @torch.inference_mode()
    def _generate(
        self,
        batch: _Batch,
        compiled: CompiledPlan,
        call: Call,
        listeners: Sequence[Listener],
    ) -> tuple[Answer, ...]:
        prepared, encoded, encoders = batch.prepared, batch.encoded, self.adapter.encoders(self.model)
        inputs = on_device(prepared.inputs, self.model) if encoded is None else encoded.inputs
        tokenizer: Any = getattr(self.processor, "tokenizer", None)
        stop = Stop(tokenizer, call.settings.stop_texts)
        stream = BatchStream(tokenizer, listeners, stop, call.settings.end_tokens) if listeners else None
        device = input_device(self.model)
        phases, memory = Phases(device), PeakMemory(*running_on(self.model))
        defaults = self.generation_config
        prompt = inputs["input_ids"].shape[1]
        arguments = call.arguments(defaults, self.adapter, stop, stream, prompt=prompt)
        with (
            guards.patched(self.model, "generation_config", defaults),
            prune(self.model, compiled, layouts=prepared.layouts) as pruning,
            nullcontext() if encoded is None else encoded.replay(encoders),
            phases.timing(self.model, encoders),
            seeded(call.settings.given.get("seed"), device),
            call.running(phases),
        ):
            output: Any = self.model.generate(**inputs, **arguments)  # pyright: ignore[reportCallIssue]
        seconds = {"media": batch.media} | phases.seconds()
        if encoded is not None:
            seconds["encode"] += encoded.seconds()
        ids = output if isinstance(output, Tensor) else output.sequences
        new_ids, layer_tokens = ids[:, prompt:], pruning.tokens()
        cuts = [(layer, slots.cpu().numpy()) for layer, slots in pruning.slots()[1:]]
        copies = len(layer_tokens) // len(prepared.layouts)  # of each prompt, for beams
        return tuple(
            self._answer(
                prepared,
                compiled.plan,
                stop,
                call,
                row,
                new_ids[row],
                layer_tokens[row * copies],
                _positions(cuts, row * copies, prompt, prepared.layouts[row]),
                seconds,
                memory.bytes(),
            )
            for row in range(len(prepared.layouts))
        )

    def conversation(self, plan: Plan) -> Conversation:
        """A new conversation under a plan."""
        return CachedConversation(self, self._compiled(plan))

    def prepare_turn(self, request: Request, earlier: Transcript) -> PreparedTurn:
        """The inputs of new messages, made by one thread at a time.  Raises: as `ModelAdapter.prepare_turn`."""
        with self._preparing:
            return self.adapter.prepare_turn(self.processor, request, earlier)

    def answering(self, cancellation: Cancellation | None) -> AbstractContextManager[None]:
        """Hold the model, for which other requests wait."""
        return self._answering.turn(cancellation)

    def refuse_nested(self) -> None:
        """Raise FastAVError in a thread that holds the model, such as in `on_text`."""
        self._answering.refuse_owner()

    def _prepared(self, requests: Sequence[Request]) -> Prepared:
        """The inputs of requests, made by one thread at a time: fast tokenizers hold their padding as state."""
        with self._preparing:
            return self.adapter.prepare(self.processor, requests)

    def require_room(self, prompt: int, new: int) -> None:
        """Raise FastAVError for a prompt and an answer that are longer than the model's limit together."""
        config: Any = self.model.config.get_text_config(decoder=True)
        if prompt + new > config.max_position_embeddings:
            raise FastAVError(
                f"a prompt of {prompt} tokens and {new} new ones exceed the model's {config.max_position_embeddings}",
                "ask for a shorter answer, in fewer words, or about a shorter part of the clip",
            )

    def _answer(
        self,
        prepared: Prepared,
        plan: Plan,
        stop: Stop,
        call: Call,
        row: int,
        ids: Tensor,
        layer_tokens: Sequence[dict[str, int]],
        kept: Sequence[tuple[int, Int[np.ndarray, " _"]]],
        seconds: dict[str, float],
        peak: int | None,
    ) -> Answer:
        layout = prepared.layouts[row]
        flops, cache = self._costs(layout, plan, layer_tokens)
        tokens, text, is_complete = until_end(ids.tolist(), call, stop)
        return Answer(
            text=text.strip(),
            token_ids=tuple(tokens),
            finish="stop" if is_complete or len(tokens) < call.settings.new_tokens(len(layout)) else "length",
            plan=plan.name or plan.fingerprint,
            prompt_tokens=layout.by_modality(),
            tokens_per_layer=tuple(layer_tokens),
            flops=flops,
            kv_bytes=cache,
            seconds=seconds,
            peak_bytes=peak,
            dropped_ends=dropped_ends(layout, kept),
        )

    def _costs(self, layout: Layout, plan: Plan, layer_tokens: Sequence[dict[str, int]]) -> tuple[Saving, Saving]:
        """FLOPs of a prefill, and bytes of its cache, from the tokens that each layer ran on."""
        shape = self.adapter.shape(self.model.config)
        full = [len(layout)] * shape.layers
        pruned = [sum(layer.values()) for layer in layer_tokens]
        stored, itemsize = plan.for_decoder(shape).cache_tokens(layout, shape.layers), self.model.dtype.itemsize
        return (
            Saving(prefill_flops(shape, full), prefill_flops(shape, pruned)),
            Saving(kv_bytes(shape, full, itemsize), kv_bytes(shape, stored, itemsize)),
        )


def _positions(
    cuts: Sequence[tuple[int, Int[np.ndarray, "batch _"]]], row: int, length: int, layout: Layout
) -> list[tuple[int, Int[np.ndarray, " _"]]]:
    """The positions in one prompt of the tokens that remain after each cut.  length: of the padded prompts."""
    return [(layer, slots[row][slots[row] < length] - (length - len(layout))) for layer, slots in cuts]
