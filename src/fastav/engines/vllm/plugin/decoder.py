"""The pruned decoder: layers before the first cut run as they are, later ones on the tokens that remain."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from fastav.engines.vllm import compat
from fastav.engines.vllm.plugin.attention_metadata import PackedMetadata
from fastav.engines.vllm.plugin.batches import Batches, RequestListener
from fastav.engines.vllm.plugin.chunked_prefill import ChunkedPrefill
from fastav.engines.vllm.plugin.decode_graphs import DecodeGraphs
from fastav.engines.vllm.plugin.held_states import BlockStore, HeldPages
from fastav.engines.vllm.plugin.late_schedule import Slice
from fastav.engines.vllm.plugin.packed_batch import BatchRow, PackedBatch, geometry
from fastav.engines.vllm.plugin.request_state import PlanCache, RequestState
from fastav.engines.vllm.plugin.requests import layout_inputs, plan_cache, plan_override
from fastav.engines.vllm.plugin.runner_v1 import BatchesV1
from fastav.engines.vllm.plugin.runner_v2 import BatchesV2
from fastav.engines.vllm.plugin.step_check import ExpectedStep, StepRecord, require_step
from fastav.engines.vllm.plugin.tensor_parallel import TensorParallel
from fastav.errors import UnsupportedModel, UnsupportedPlan
from fastav.method import ATTENTION_SIGNALS


def prune_decoder(runner: Any, config: Any) -> "DecoderPruner":
    """Make the decoder of a model runner's model prune as vLLM's configuration says.  Raises: UnsupportedModel."""
    plans, model = plan_cache(config), runner.get_model()
    decoder = getattr(getattr(model, "language_model", None), "model", None)
    decoder_class = type(decoder)
    if f"{decoder_class.__module__.rpartition('.')[2]}.{decoder_class.__name__}" not in compat.DECODERS:
        raise UnsupportedModel(
            f"vLLM runs {plans.default.pruning.adapter.name} as {type(model).__name__}, whose decoder is not known",
            "leave --model-impl out",
        )
    decoder.__class__ = _pruned_class(decoder_class)  # which keeps its weights and compiled code
    batches_class = BatchesV2 if config.use_v2_model_runner else BatchesV1
    decoder.__dict__["pruner"] = pruner = DecoderPruner(plans, decoder, lambda pruner: batches_class(runner, pruner))
    if isinstance(pruner.batches, BatchesV2) and compat.has_decode_graphs(config):
        sizes = config.scheduler_config.max_num_seqs, config.model_config.max_model_len
        pruner.batches.graphs = pruner.graphs = pruner.decode_graphs(*sizes)
    return pruner


@cache
def _pruned_class(decoder_class: Any) -> type:
    """A decoder class that runs its layers through a `DecoderPruner`."""

    class PrunedDecoder(decoder_class):
        def __call__(
            self,
            input_ids: Any,
            positions: Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Any = None,
            deepstack_input_embeds: Any = None,
        ) -> Any:
            call = super().__call__

            def run_unpruned() -> Any:
                more = {} if deepstack_input_embeds is None else {"deepstack_input_embeds": deepstack_input_embeds}
                return call(input_ids, positions, intermediate_tensors, inputs_embeds, **more)

            deepstack = [] if deepstack_input_embeds is None else list(deepstack_input_embeds.tensors.values())
            return self.pruner.forward(run_unpruned, input_ids, positions, inputs_embeds, deepstack)

    return PrunedDecoder


class DecoderPruner:
    """Runs a decoder's layers by the plans of the requests in each batch.

    batches_for: makes the batches of a model runner, which tell the given listener of requests. request_states: by
    request id, of the requests that run. layer_names: of the decoder's attention, in order. held_layers: by name, the
    layers of the KV cache that hold states; set before it is allocated.
    Raises: UnsupportedPlan for an unknown attention backend.
    """

    def __init__(self, plans: PlanCache, decoder: Any, batches_for: Callable[[RequestListener], Batches]) -> None:
        self.decoder, self.plans = decoder, plans
        self.batches = batches_for(self)
        self.graphs: DecodeGraphs | None = None
        self._is_warming_up = False
        self.request_states: dict[str, RequestState] = {}
        self.held_layers: dict[str, Any] = {}
        self._chunked: dict[str, tuple[ChunkedPrefill, tuple[BlockStore, BlockStore]]] = {}
        self.ranks = TensorParallel(compat.get_tp_group())
        self.layer_names = [layer.self_attn.attn.layer_name for layer in decoder.layers]
        for backend in {layer.self_attn.attn.attn_backend.get_name() for layer in decoder.layers}:
            if backend not in compat.ATTENTION_BACKENDS:
                raise UnsupportedPlan(
                    f"pruning does not support the attention backend {backend}",
                    f"--attention-backend {compat.ATTENTION_BACKENDS[-1]}",
                )
        self.metadata = PackedMetadata(self.batches, self.layer_names)
        self._record = StepRecord(len(self.layer_names))
        for index, layer in enumerate(decoder.layers):
            self._record.attach(layer.self_attn.attn.impl, index)

    def decode_graphs(self, max_requests: int, max_len: int) -> DecodeGraphs:
        """New buffers for CUDA graphs of decoding steps.

        max_requests: of a step. max_len: tokens of a request.
        """
        states, record = self.request_states, self._record
        return DecodeGraphs(self.batches, states, self.layer_names, record, max_requests, max_len)

    @contextmanager
    def checked_step(self, scheduler_output: Any) -> Iterator[None]:
        """Check at the end of a step that every layer has run as the plan says.  Raises: PlanNotApplied."""
        self._record.clear()
        with self.batches.step(scheduler_output):
            yield
        if not (tokens := scheduler_output.num_scheduled_tokens):
            return
        computed = compat.num_computed_tokens(scheduler_output)
        if not tokens.keys() <= self.request_states.keys():
            self.batches.rows()  # vLLM has not called the decoder
        states = [self.request_states[request_id] for request_id in tokens]
        step = ExpectedStep.of(states, [computed[request_id] for request_id in tokens], list(tokens.values()))
        require_step(step, self._record)

    @torch.inference_mode()
    def forward(
        self, run_unpruned: Any, input_ids: Any, positions: Tensor, embeds: Any, deepstack: Sequence[Tensor]
    ) -> Any:
        """The decoder's hidden states, at the indices of the whole batch; zero where tokens were dropped.

        run_unpruned: runs the decoder as it is. deepstack: what is added after each of the first layers, for all tokens
        of the batch.
        """
        context = compat.get_forward_context()
        if not context.attn_metadata or not self.batches.is_armed:
            with nullcontext() if self.graphs is None else self.graphs.captured_slots(context):
                return run_unpruned()  # vLLM profiles memory, compiles, warms up or captures graphs
        rows = self.batches.rows()
        batch = PackedBatch([self._row(index, *row) for index, row in enumerate(rows)], positions.device)
        if batch.is_unpruned:
            return run_unpruned()
        if not batch.is_cut:
            with self.metadata.override(context, batch) as update:
                update()
                return run_unpruned()
        hidden = self.decoder.embed_input_ids(input_ids) if embeds is None else embeds
        with self.metadata.override(context, batch) as update:
            out = self._run_layers(batch, hidden, positions, deepstack, update)
        self._run_late(context, batch, out)
        self._drop_prefills([row.request_id for row in rows], batch)
        return out

    def _run_layers(
        self, batch: PackedBatch, hidden: Tensor, positions: Tensor, deepstack: Sequence[Tensor], update: Any
    ) -> Tensor:
        residual, remaining, cut_layers = None, None, batch.cut_layers
        out = torch.zeros_like(hidden)
        if batch.is_uneven:
            hidden, positions, deepstack = self._with_withheld(batch, hidden, positions, deepstack)
            remaining = batch.remaining()
            hidden = hidden[remaining]
        for index, layer in enumerate(self.decoder.layers):
            if index in cut_layers:
                hidden = hidden if residual is None else hidden + residual
                hidden, residual = (
                    batch.cut(index, hidden if remaining is not None else hidden[: batch.num_tokens]),
                    None,
                )
                remaining = batch.remaining()
                if not len(remaining):
                    return out  # a piece of a prompt of which no token remains
                update(index)
            layer_positions = positions if remaining is None else positions[..., remaining]
            with self._observe(batch, index, layer):
                hidden, residual = layer(layer_positions, hidden, residual)
            if index < len(deepstack):
                hidden = hidden + (deepstack[index] if remaining is None else deepstack[index][remaining])
        hidden, _ = self.decoder.norm(hidden, residual)
        out[remaining] = hidden
        return out

    def _with_withheld(
        self, batch: PackedBatch, hidden: Tensor, positions: Tensor, deepstack: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """What enters the decoder, with the batch's withheld tokens behind all others."""
        count, ids = batch.num_tokens, batch.withheld
        if not len(ids):
            return hidden[:count], positions[..., :count], [one[:count] for one in deepstack]
        withheld = self.decoder.embed_input_ids(ids)
        hidden = torch.cat([hidden[:count], withheld])
        positions = torch.cat([positions[..., :count], batch.withheld_positions.to(positions)], -1)
        return hidden, positions, [torch.cat([one[:count], torch.zeros_like(withheld)]) for one in deepstack]

    def _run_late(self, context: Any, batch: PackedBatch, out: Tensor) -> None:
        """Run the late slices of prompts in chunks, and put the states of their last tokens into `out`."""
        for index, row in enumerate(batch.rows):
            if (chunks := row.chunks) is None:
                continue
            for one in chunks.late.slices(row.num_computed, row.num_tokens):
                chunks.begin(one)
                hidden = self._run_slice(context, chunks, index, one)
                if one.stage == len(chunks.late.stages) - 1:
                    out[batch.last_index(index)] = hidden[-1]
                else:
                    chunks.hold(hidden)

    def _run_slice(self, context: Any, chunks: ChunkedPrefill, row: int, one: Slice) -> Tensor:
        """The hidden states after a slice's layers; after the decoder's norm if these are its last."""
        first, end, _ = chunks.late.stages[one.stage]
        hidden, residual, positions = chunks.states(one), None, chunks.positions_of(one)
        where = geometry([0] * row + [one.end - one.start], [0] * row + [one.start])
        with self.metadata.override_slice(context, range(first, end), where):
            for index in range(first, end):
                layer = self.decoder.layers[index]
                with self._observe_slice(chunks, index, layer):
                    hidden, residual = layer(positions, hidden, residual)
        if end == len(self.decoder.layers):
            return self.decoder.norm(hidden, residual)[0]
        return hidden + residual

    def _row(self, index: int, request_id: str, num_computed: int, num_tokens: int) -> BatchRow:
        """A request of the batch.  index: its row."""
        state = self.request_states[request_id]
        if not state.comes_in_chunks(num_computed, num_tokens):
            return BatchRow(state, num_computed, num_tokens)
        assert state.late is not None
        assert state.prefill is not None
        if request_id not in self._chunked:
            prompt, buffer = (BlockStore(pages) for pages in self._held_pages)
            chunks = ChunkedPrefill(
                state.late,
                state.prefill,
                self.batches.prompt_positions(request_id, state.prompt_len),
                prompt,
                buffer,
                self.ranks,
                self.decoder.layers[0].self_attn.total_num_kv_heads,
                num_computed,
            )
            self._chunked[request_id] = chunks, (prompt, buffer)
        chunks, stores = self._chunked[request_id]
        for store, pages in zip(stores, self._held_pages, strict=True):
            store.enter_step({group: self.batches.block_table(group)[index] for group in pages.groups})
        return BatchRow(state, num_computed, num_tokens, chunks)

    @property
    def held_features(self) -> int:
        """What is held of a token, in numbers of the model's dtype: a hidden state, and one layer's keys of this rank."""
        attention = self.decoder.layers[0].self_attn
        return len(self.decoder.norm.weight) + attention.num_kv_heads * attention.head_dim

    @cached_property
    def _held_pages(self) -> tuple[HeldPages, HeldPages]:
        """The memory for states that enter the held layer, and for those between late steps."""
        attention, groups = self.decoder.layers[0].self_attn, self.batches.kv_groups()

        def pages(*, is_buffer: bool) -> HeldPages:
            layers = {name: layer for name, layer in self.held_layers.items() if layer.spec.is_buffer is is_buffer}
            caches = [
                (group, layers[name].kv_cache) for group, names in enumerate(groups) for name in names if name in layers
            ]
            spec = next(iter(layers.values())).spec
            return HeldPages(
                caches,
                block_size=self.batches.block_size(caches[0][0]),
                features=spec.page_size_bytes // (spec.block_size * self.decoder.norm.weight.itemsize),
                key_features=attention.num_kv_heads * attention.head_dim,
                like=self.decoder.norm.weight,
            )

        return pages(is_buffer=False), pages(is_buffer=True)

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Run requests that vLLM makes up unpruned: their ids are any, also those of media that they do not have."""
        self._is_warming_up = True
        try:
            yield
        finally:
            self._is_warming_up = False

    def start_request(self, request_id: str, request: Any) -> None:
        """A request begins, or begins again after it was preempted; as `Batches` tells it."""
        if self._is_warming_up:
            self.request_states[request_id] = self.plans.default.unpruned_state(len(request.prompt_token_ids))
            return
        runtime = self.plans.get(plan_override(request.sampling_params))
        inputs = layout_inputs(runtime.pruning.adapter, request)
        broadcast = None if self.ranks.is_single else self.ranks.broadcast_indices
        self.request_states[request_id] = runtime.request_state(inputs, self.batches.device, broadcast)

        self._chunked.pop(request_id, None)

    def end_request(self, request_id: str) -> None:
        """A request has ended, or was preempted."""
        del self.request_states[request_id]
        self._chunked.pop(request_id, None)

    def _drop_prefills(self, request_ids: Sequence[str], batch: PackedBatch) -> None:
        """Free what only the prefill needed, of requests whose prompts have run."""
        for request_id, row in zip(request_ids, batch.rows, strict=True):
            if row.state.prefill is not None and row.num_computed + row.num_tokens >= row.state.prompt_len:
                self.request_states[request_id] = replace(row.state, prefill=None)
                self._chunked.pop(request_id, None)

    @contextmanager
    def _observe_slice(self, chunks: ChunkedPrefill, index: int, layer: Any) -> Iterator[None]:
        """Record the signals that a prompt in chunks needs of a layer's attention."""
        if not (signals := chunks.signals(index)):
            yield
            return

        def record(_: Any, inputs: tuple[Tensor, ...]) -> None:
            chunks.observe(signals, *_by_head(layer.self_attn, inputs), layer.self_attn.scaling)

        hook = layer.self_attn.attn.register_forward_pre_hook(record)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _observe(self, batch: PackedBatch, index: int, layer: Any) -> Iterator[None]:
        """Record the signals that methods need of a layer's attention."""
        if not (signals := batch.signals(index)):
            yield
            return
        attention, ranks = layer.self_attn, self.ranks

        def record(_: Any, inputs: tuple[Tensor, ...]) -> None:
            query, key = _by_head(attention, inputs)
            batch.observe(index, signals, query, key, attention.scaling, in_chunks=True)
            if means := signals & ATTENTION_SIGNALS:
                batch.observe(index, means, query, key, attention.scaling, in_chunks=False)
                batch.average(index, means, ranks.mean)
            if others := signals - ATTENTION_SIGNALS:
                query = ranks.gather_heads(query, attention.total_num_heads)
                key = ranks.gather_heads(key, attention.total_num_kv_heads)
                batch.observe(index, others, query, key, attention.scaling, in_chunks=False)

        hook = attention.attn.register_forward_pre_hook(record)
        try:
            yield
        finally:
            hook.remove()


def _by_head(attention: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A layer's queries and keys, [tokens, heads, head], from what its attention is given."""
    query, key = inputs[:2]
    return query.view(-1, attention.num_heads, attention.head_dim), key.view(
        -1, attention.num_kv_heads, attention.head_dim
    )
