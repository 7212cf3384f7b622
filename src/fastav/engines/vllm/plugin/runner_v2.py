"""The batches of vLLM's model runner V2, its default on a GPU, which tells the model's state of requests and batches.

A model's state is an object of vLLM with methods for what differs between models. The runner calls them in each step:
`remove_request` (ended and preempted requests), `add_request` (new and resumed ones), `preprocess_state` (the batch and
its block tables; only for batches of requests), `prepare_attn` (also for batches that warm up or capture graphs), then
the model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fastav.engines.vllm import compat
from fastav.engines.vllm.plugin.batches import BuildMetadata, RequestListener, ScheduledRequest
from fastav.engines.vllm.plugin.decode_graphs import DecodeGraphs
from fastav.errors import UnsupportedModel, UnsupportedPlan


class BatchesV2:
    """Implements `Batches`.

    runner: vLLM's, with its model loaded. listener: is told which requests begin and end. graphs: of decoding steps;
    None refuses them.
    Raises: UnsupportedModel for a model with a state of its own.
    """

    def __init__(self, runner: Any, listener: RequestListener) -> None:
        self._runner, self._listener = runner, listener
        self.graphs: DecodeGraphs | None = None
        self._requests: set[str] = set()  # that the listener knows
        self._batch: Any = None  # of the running step, as vLLM's InputBatch
        self._block_tables: Sequence[Tensor] = ()
        state = runner.model_state
        if type(state) is not compat.DefaultModelState:
            raise UnsupportedModel(
                f"vLLM's model runner V2 keeps a {type(state).__name__} for this model, which fastav does not know",
                "VLLM_USE_V2_MODEL_RUNNER=0",
            )
        state.__class__ = _pruning_state(type(state))
        state.batches = self

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._runner.device

    @contextmanager
    def step(self, scheduler_output: Any) -> Iterator[None]:
        """A step of requests."""
        try:
            yield
        finally:
            self._disarm()

    @property
    def is_armed(self) -> bool:
        """Whether the runner has prepared a batch of requests, and none for something else since."""
        return self._batch is not None

    def rows(self) -> list[ScheduledRequest]:
        """The requests of the batch, in its order."""
        batch = self._batch
        assert batch is not None, "vLLM runs no batch of requests"
        assert not batch.num_draft_tokens, "speculative decoding is refused at start"
        counts = batch.num_computed_tokens_np.tolist(), batch.num_scheduled_tokens.tolist()
        return [ScheduledRequest(*row) for row in zip(batch.req_ids, *counts, strict=True)]

    def prompt_positions(self, request_id: str, length: int) -> Int[Tensor, "*axes tokens"]:
        """The positions of a prompt's tokens."""
        rope = self._runner.model_state.rope_state
        if rope is None:
            return torch.arange(length, device=self.device)
        return rope.read_prefill_positions(self._runner.req_states.req_id_to_index[request_id], length).long()

    def kv_groups(self) -> Sequence[Sequence[str]]:
        """The names of the layers in each group of the KV cache."""
        return [group.layer_names for group in self._runner.kv_cache_config.kv_cache_groups]

    def block_table(self, group: int) -> Int[Tensor, "requests blocks"]:
        """The blocks of the batch's requests, in the size of the KV cache, whichever the backend's kernel takes."""
        return self._block_tables[group][: self._batch.num_reqs]

    def block_size(self, group: int) -> int:
        """How many tokens each of these blocks holds."""
        return self._runner.block_tables.block_sizes[group]

    def metadata_builder(self, layer_name: str) -> BuildMetadata:
        """A new builder of a layer's attention metadata, which gives the kernel blocks of its own size."""
        groups = [group for groups in self._runner.attn_groups for group in groups]
        (group,) = (group for group in groups if layer_name in group.layer_names)
        own = compat.AttentionGroup(group.backend, [layer_name], group.kv_cache_spec, group.kv_cache_group_id)
        kernel_block_size = self._runner.kernel_block_sizes[group.kv_cache_group_id]
        own.create_metadata_builders(self._runner.vllm_config, self._runner.device, kernel_block_size)
        own.kernel_block_stride = group.kernel_block_stride
        return own.build_metadata

    def add_request(self, request: Any) -> None:
        """A request begins, or goes on after it was preempted.

        request: vLLM's NewRequestData; its `prompt_token_ids` are the prompt alone also when an answer has begun.
        Raises: UnsupportedPlan for a prompt that has become longer.
        """
        if request.num_computed_tokens and not self._runner.cache_config.enable_prefix_caching:
            raise UnsupportedPlan("a prompt grew after it had run, as streamed input does", "send whole prompts")
        self._listener.start_request(request.req_id, request)
        self._requests.add(request.req_id)

    def remove_request(self, request_id: str) -> None:
        """A request has ended or was preempted, or is about to begin."""
        if request_id in self._requests:
            self._requests.remove(request_id)
            self._listener.end_request(request_id)

    def arm(self, batch: Any, block_tables: Sequence[Tensor]) -> None:
        """The next batch that the decoder runs.

        batch: vLLM's InputBatch. block_tables: of its requests, for each group of the KV cache.
        """
        self._batch, self._block_tables = batch, block_tables

    def prepare(self, batch: Any) -> None:
        """The batch whose attention is about to be prepared; one that is not armed ends the step."""
        if batch is not self._batch:
            self._disarm()
        if self.graphs is not None:
            self.graphs.is_prepared = False

    def graph_metadata(self, batch: Any, block_tables: Sequence[Tensor], for_capture: bool) -> dict[str, Any]:
        """The attention metadata of a batch that runs as a graph of the whole model, by layer.

        Raises: UnsupportedPlan, unless such graphs were tested.
        """
        if self.graphs is None:
            raise UnsupportedPlan(
                "CUDA graphs of the whole model replay with the token counts of their capture",
                "leave cudagraph_mode out",
            )
        return self.graphs.prepare(batch, self.rows() if self.is_armed else [], block_tables, for_capture)

    def _disarm(self) -> None:
        self._batch, self._block_tables = None, ()


@cache
def _pruning_state(state_class: Any) -> type:
    """A class of model states that reports to a `BatchesV2` in its attribute `batches`."""

    class PruningModelState(state_class):
        batches: BatchesV2

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.batches.add_request(new_req_data)

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self.batches.remove_request(req_id)

        def preprocess_state(self, input_batch: Any, block_tables: Any, *args: Any, **kwargs: Any) -> None:
            super().preprocess_state(input_batch, block_tables, *args, **kwargs)
            self.batches.arm(input_batch, block_tables)

        def prepare_attn(
            self, input_batch: Any, cudagraph_mode: Any, block_tables: Any, *args: Any, **kwargs: Any
        ) -> dict[str, Any]:
            self.batches.prepare(input_batch)
            metadata = super().prepare_attn(input_batch, cudagraph_mode, block_tables, *args, **kwargs)
            if cudagraph_mode.name != "FULL":
                return metadata
            for_capture = kwargs.get("for_capture", False)
            return metadata | self.batches.graph_metadata(input_batch, block_tables, for_capture)

    return PruningModelState
