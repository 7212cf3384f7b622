"""The pruned decoder: layers before the first cut run as they are, later ones on the tokens that remain."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastav.engines.vllm import compat
from fastav.engines.vllm.plugin.attention_metadata import PackedMetadata
from fastav.engines.vllm.plugin.batches import Batches, RequestListener
from fastav.engines.vllm.plugin.decode_graphs import DecodeGraphs
from fastav.engines.vllm.plugin.late_layers import LateLayers, by_head
from fastav.engines.vllm.plugin.lora import adapters_of_rows, following_cuts
from fastav.engines.vllm.plugin.packed_batch import PackedBatch
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
    decoder.__dict__["pruner"] = pruner = DecoderPruner(plans, decoder, runner, batches_class)
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

            def run_unpruned(tokens: Tensor | None = None) -> Any:
                ids, embeds, visual = input_ids, inputs_embeds, deepstack_input_embeds
                if tokens is not None:
                    ids, embeds = (None if one is None else one[tokens] for one in (ids, embeds))
                    if visual is not None:
                        visual = type(visual)({name: one[tokens] for name, one in visual.tensors.items()})
                more = {} if visual is None else {"deepstack_input_embeds": visual}
                return call(ids, _of_tokens(positions, tokens), intermediate_tensors, embeds, **more)

            deepstack = [] if deepstack_input_embeds is None else list(deepstack_input_embeds.tensors.values())
            return self.pruner.forward(run_unpruned, input_ids, positions, inputs_embeds, deepstack)

    return PrunedDecoder


def _of_tokens(positions: Tensor, tokens: Tensor | None) -> Tensor:
    """The positions of some tokens (None: of all), with the strides that a compiled decoder expects."""
    if tokens is None:
        return positions
    taken = torch.empty_strided(
        (*positions.shape[:-1], len(tokens)), positions.stride(), dtype=positions.dtype, device=positions.device
    )
    return taken.copy_(positions[..., tokens])


class DecoderPruner:
    """Runs a decoder's layers by the plans of the requests in each batch.

    runner: vLLM's. batches_class: of its batches, which tell the given listener of requests. request_states: by request
    id, of the requests that run. layer_names: of the decoder's attention, in order. late: runs prompts in chunks.
    Raises: UnsupportedPlan for an unknown attention backend.
    """

    def __init__(
        self, plans: PlanCache, decoder: Any, runner: Any, batches_class: Callable[[Any, RequestListener], Batches]
    ) -> None:
        self.decoder, self.plans = decoder, plans
        self.runner, self.batches = runner, batches_class(runner, self)
        self.graphs: DecodeGraphs | None = None
        self._is_warming_up = False
        self.request_states: dict[str, RequestState] = {}
        self.ranks = TensorParallel(compat.get_tp_group())
        self.layer_names = [layer.self_attn.attn.layer_name for layer in decoder.layers]
        for backend in {layer.self_attn.attn.attn_backend.get_name() for layer in decoder.layers}:
            if backend not in compat.ATTENTION_BACKENDS:
                raise UnsupportedPlan(
                    f"pruning does not support the attention backend {backend}",
                    f"--attention-backend {compat.ATTENTION_BACKENDS[-1]}",
                )
        self.metadata = PackedMetadata(self.batches, self.layer_names)
        self.late = LateLayers(decoder, self.batches, self.metadata, self.ranks)
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
        num_computed = [computed[request_id] for request_id in tokens]
        step = ExpectedStep.of(states, num_computed, list(tokens.values()), is_split=self._record.is_split)
        require_step(step, self._record)

    @torch.inference_mode()
    def forward(
        self, run_unpruned: Any, input_ids: Any, positions: Tensor, embeds: Any, deepstack: Sequence[Tensor]
    ) -> Any:
        """The decoder's hidden states, at the indices of the whole batch; zero where tokens were dropped.

        run_unpruned: runs the decoder as it is, on some tokens of the batch or on all. deepstack: what is added after
        each of the first layers, for all tokens of the batch.
        """
        context = compat.get_forward_context()
        if not context.attn_metadata or not self.batches.is_armed:
            with nullcontext() if self.graphs is None else self.graphs.captured_slots(context):
                return run_unpruned()  # vLLM profiles memory, compiles, warms up or captures graphs
        rows = self.batches.rows()
        batch = PackedBatch(
            [self.late.row(index, self.request_states[row.request_id], row) for index, row in enumerate(rows)],
            positions.device,
        )
        if batch.is_unpruned:
            return run_unpruned()
        if not batch.is_cut:
            with self.metadata.override(context, batch) as update:
                update()
                return run_unpruned()
        hidden = self.decoder.embed_input_ids(input_ids) if embeds is None else embeds
        out = torch.zeros_like(hidden)
        if not getattr(self.decoder, "do_not_compile", True) and len(uncut := batch.uncut_tokens()):
            out[uncut] = self._run_uncut(context, batch, partial(run_unpruned, uncut))
        with (
            self.metadata.override(context, batch) as update_metadata,
            following_cuts(self.runner, batch, update_metadata) as update,
        ):
            self._run_layers(batch, hidden, positions, deepstack, update, out)
        self.late.run(context, batch, out, partial(adapters_of_rows, self.runner, batch))
        self._drop_prefills([row.request_id for row in rows], batch)
        return out

    def _run_uncut(self, context: Any, batch: PackedBatch, run: Callable[[], Tensor]) -> Tensor:
        """Run the requests that no cut concerns, as their answers go on, by the compiled decoder.

        The others remain in the batch.
        """
        counts = [0 if row.is_cut else row.num_tokens for row in batch.rows]
        rows = np.flatnonzero(counts)
        with (
            self.metadata.override_uncut(context, batch, counts),
            adapters_of_rows(self.runner, batch, rows, np.array(counts)[rows]),
        ):
            hidden = run()
        batch.set_aside_uncut()
        self._record.is_split = True
        return hidden

    def _run_layers(
        self,
        batch: PackedBatch,
        hidden: Tensor,
        positions: Tensor,
        deepstack: Sequence[Tensor],
        update: Any,
        out: Tensor,
    ) -> None:
        residual, remaining, cut_layers = None, None, batch.cut_layers
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
                    return  # a piece of a prompt of which no token remains
                update(index)
            layer_positions = positions if remaining is None else positions[..., remaining]
            with self._observe(batch, index, layer):
                hidden, residual = layer(layer_positions, hidden, residual)
            if index < len(deepstack):
                hidden = hidden + (deepstack[index] if remaining is None else deepstack[index][remaining])
        hidden, _ = self.decoder.norm(hidden, residual)
        out[remaining] = hidden

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

        self.late.drop(request_id)

    def end_request(self, request_id: str) -> None:
        """A request has ended, or was preempted."""
        del self.request_states[request_id]
        self.late.drop(request_id)

    def _drop_prefills(self, request_ids: Sequence[str], batch: PackedBatch) -> None:
        """Free what only the prefill needed, of requests whose prompts have run."""
        for request_id, row in zip(request_ids, batch.rows, strict=True):
            if row.state.prefill is not None and row.num_computed + row.num_tokens >= row.state.prompt_len:
                self.request_states[request_id] = replace(row.state, prefill=None)
                self.late.drop(request_id)

    @contextmanager
    def _observe(self, batch: PackedBatch, index: int, layer: Any) -> Iterator[None]:
        """Record the signals that methods need of a layer's attention."""
        if not (signals := batch.signals(index)):
            yield
            return
        attention, ranks = layer.self_attn, self.ranks

        def record(_: Any, inputs: tuple[Tensor, ...]) -> None:
            query, key = by_head(attention, inputs)
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
