"""The pruned decoder: layers before the first cut run as they are, later ones on the tokens that remain."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastav.engines.vllm import compat
from fastav.engines.vllm.plugin.attention_metadata import PackedMetadata
from fastav.engines.vllm.plugin.lora import following_cuts
from fastav.engines.vllm.plugin.packed_batch import BatchRow, PackedBatch
from fastav.engines.vllm.plugin.request_state import PlanCache, RequestState
from fastav.engines.vllm.plugin.requests import layout_inputs, plan_cache, plan_override
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
    decoder.__dict__["pruner"] = pruner = DecoderPruner(plans, decoder, runner)
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

    request_states: by request id, of the requests that run. layer_names: of the decoder's attention, in order.
    Raises: UnsupportedPlan for an unknown attention backend.
    """

    def __init__(self, plans: PlanCache, decoder: Any, runner: Any) -> None:
        self.decoder, self.runner, self.plans = decoder, runner, plans
        self.request_states: dict[str, RequestState] = {}
        self.ranks = TensorParallel(compat.get_tp_group())
        self.layer_names = [layer.self_attn.attn.layer_name for layer in decoder.layers]
        for backend in {layer.self_attn.attn.attn_backend.get_name() for layer in decoder.layers}:
            if backend not in compat.ATTENTION_BACKENDS:
                raise UnsupportedPlan(
                    f"pruning does not support the attention backend {backend}",
                    f"--attention-backend {compat.ATTENTION_BACKENDS[-1]}",
                )
        self.metadata = PackedMetadata(runner, self.layer_names)
        self._record = StepRecord(len(self.layer_names))
        for index, layer in enumerate(decoder.layers):
            self._record.attach(layer.self_attn.attn.impl, index)

    @contextmanager
    def checked_step(self, scheduler_output: Any) -> Iterator[None]:
        """Check at the end of a step that every layer has run as the plan says.  Raises: PlanNotApplied."""
        self._record.clear()
        yield
        if not (tokens := scheduler_output.num_scheduled_tokens):
            return
        computed = compat.num_computed_tokens(scheduler_output)
        states = [
            self.request_states.get(request_id)
            or self._request_state(request_id, self.runner.requests[request_id], num_computed=0)
            for request_id in tokens
        ]
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
        if not context.attn_metadata:
            return run_unpruned()  # vLLM profiles memory or compiles
        batch = PackedBatch(self._rows(), positions.device)
        if batch.is_unpruned:
            return run_unpruned()
        if not batch.is_cut:
            with self.metadata.override(context, batch) as update:
                update()
                return run_unpruned()
        hidden = self.decoder.embed_input_ids(input_ids) if embeds is None else embeds
        with (
            self.metadata.override(context, batch) as update_metadata,
            following_cuts(self.runner, batch, update_metadata) as update,
        ):
            out = self._run_layers(batch, hidden, positions, deepstack, update)
        self._drop_prefills()
        return out

    def _run_layers(
        self, batch: PackedBatch, hidden: Tensor, positions: Tensor, deepstack: Sequence[Tensor], update: Any
    ) -> Tensor:
        residual, remaining, cut_layers = None, None, batch.cut_layers
        out = torch.zeros_like(hidden)
        for index, layer in enumerate(self.decoder.layers):
            if index in cut_layers:
                hidden = hidden if residual is None else hidden + residual
                hidden, residual = batch.cut(index, hidden[: batch.num_tokens]), None
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

    def _rows(self) -> list[BatchRow]:
        """The requests of the batch, in its order."""
        batch, requests = self.runner.input_batch, self.runner.requests
        for ended in self.request_states.keys() - requests.keys():
            del self.request_states[ended]
        num_tokens = np.diff(self.runner.query_start_loc.np[: batch.num_reqs + 1]).tolist()
        num_computed = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
        return [
            BatchRow(self._request_state(request_id, requests[request_id], computed), computed, tokens)
            for request_id, computed, tokens in zip(batch.req_ids, num_computed, num_tokens, strict=True)
        ]

    def _request_state(self, request_id: str, request: Any, num_computed: int) -> RequestState:
        if not num_computed:  # a new request, or one that was preempted
            runtime = self.plans.get(plan_override(request.sampling_params))
            inputs = layout_inputs(runtime.pruning.adapter, request)
            broadcast = None if self.ranks.is_single else self.ranks.broadcast_indices
            self.request_states[request_id] = runtime.request_state(inputs, self.runner.device, broadcast)
        state = self.request_states[request_id]
        if state.prompt_len != request.num_prompt_tokens:
            raise UnsupportedPlan("a prompt grew after it had run, as streamed input does", "send whole prompts")
        return state

    def _drop_prefills(self) -> None:
        """Free what only the prefill needed."""
        for request_id, state in self.request_states.items():
            if state.prefill is not None:
                self.request_states[request_id] = replace(state, prefill=None)

    @contextmanager
    def _observe(self, batch: PackedBatch, index: int, layer: Any) -> Iterator[None]:
        """Record the signals that methods need of a layer's attention."""
        if not (signals := batch.signals(index)):
            yield
            return
        attention, ranks = layer.self_attn, self.ranks

        def record(_: Any, inputs: tuple[Tensor, ...]) -> None:
            query, key = (
                x.view(-1, heads, attention.head_dim)
                for x, heads in zip(inputs, (attention.num_heads, attention.num_kv_heads), strict=False)
            )
            if means := signals & ATTENTION_SIGNALS:
                batch.observe(index, means, query, key, attention.scaling)
                batch.average(index, means, ranks.mean)
            if others := signals - ATTENTION_SIGNALS:
                query = ranks.gather_heads(query, attention.total_num_heads)
                key = ranks.gather_heads(key, attention.total_num_kv_heads)
                batch.observe(index, others, query, key, attention.scaling)

        hook = attention.attn.register_forward_pre_hook(record)
        try:
            yield
        finally:
            hook.remove()
