"""Attention inputs of decoding batches that run as one CUDA graph of the whole model; off until a GPU test has passed.

A graph reads what it was captured with. When vLLM captures one, the decoder's Python runs, and each layer is given
buffers at fixed addresses for its lengths and slots, as layers hold different numbers of tokens. When vLLM replays it,
no Python of the decoder runs, so the buffers are refilled before, where model runner V2 prepares attention. Rows that
only pad a batch have the slot -1, which is not written.

`compat.DECODE_GRAPHS` names the versions of vLLM with which this is on: none.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fastav.engines.vllm import compat
from fastav.engines.vllm.plugin.attention_metadata import PADDING_SLOT
from fastav.engines.vllm.plugin.batches import Batches, BuildMetadata, ScheduledRequest
from fastav.engines.vllm.plugin.request_state import RequestState
from fastav.engines.vllm.plugin.step_check import StepRecord
from fastav.errors import UnsupportedPlan
from fastav.transfer import upload


class DecodeGraphs:
    """The buffers of a decoder's layers.

    is_prepared: whether they were refilled for the batch that runs next. batches: of the model runner. states: of the
    requests that run, by id. layer_names: of the decoder, in order. record: where a replayed step is written down, as
    no attention is called in it. max_requests: of a batch. max_len: tokens of a request.
    """

    def __init__(
        self,
        batches: Batches,
        states: Mapping[str, RequestState],
        layer_names: Sequence[str],
        record: StepRecord,
        max_requests: int,
        max_len: int,
    ) -> None:
        self.batches, self.states, self.layer_names, self._record = batches, states, layer_names, record
        self._max_len = max_len
        shape, device = (len(layer_names), max_requests), batches.device
        self.seq_lens = torch.zeros(shape, dtype=torch.int32, device=device)
        self.slots = torch.full(shape, PADDING_SLOT, dtype=torch.int64, device=device)
        self._builders: dict[str, BuildMetadata] = {}
        self.is_prepared = False

    def prepare(
        self, batch: Any, rows: Sequence[ScheduledRequest], block_tables: Sequence[Tensor], for_capture: bool
    ) -> dict[str, Any]:
        """Refill the buffers for a batch, and return the metadata of each layer's attention, by its name.

        batch: vLLM's InputBatch. rows: its requests; none while a graph is captured. block_tables: of the batch with
        its padding, for each group of the KV cache, at vLLM's own fixed addresses.
        Raises: UnsupportedPlan for a batch that does more than to decode.
        """
        padded = batch.num_reqs_after_padding
        if batch.num_tokens_after_padding != padded:
            raise UnsupportedPlan("a graph of the whole model decodes one token of each request", "cudagraph_mode")
        kv_lens, stored = self._kv_lens(rows, padded)
        lens, is_stored = (
            upload(array.ravel(), self.batches.device).view(array.shape) for array in (kv_lens, stored.astype(np.int32))
        )
        self.seq_lens[:, :padded] = lens
        metadata: dict[str, Any] = {}
        for group, names in enumerate(self.batches.kv_groups()):
            if layers := [index for index, name in enumerate(self.layer_names) if name in names]:
                self._refill_slots(
                    layers, is_stored[layers], block_tables[group][:padded], self.batches.block_size(group)
                )
                for layer in layers:
                    max_len = self._max_len if for_capture else int(kv_lens[layer].max())
                    common = self._common(batch, layer, kv_lens[layer], block_tables[group][:padded], max_len)
                    metadata[self.layer_names[layer]] = self._builder(layer)(common)
        if not for_capture:
            count = len(rows)
            self._record.replay(kv_lens[:, :count], stored[:, :count])
        self.is_prepared = True
        return metadata

    @contextmanager
    def captured_slots(self, context: Any) -> Iterator[None]:
        """Give the layers their slots in place of the forward context's, if a graph is captured.

        context: vLLM's forward context.
        """
        if not self.is_prepared:
            yield
            return
        own, width = copy(context), len(context.slot_mapping[self.layer_names[0]])
        slots = {name: self.slots[layer, :width] for layer, name in enumerate(self.layer_names)}
        own.slot_mapping = {**context.slot_mapping, **slots}
        with compat.override_forward_context(own):
            yield

    def _kv_lens(
        self, rows: Sequence[ScheduledRequest], padded: int
    ) -> tuple[Int[np.ndarray, "layers padded"], Bool[np.ndarray, "layers padded"]]:
        """The tokens that each layer's cache holds of each request after the step, and whether its token is among them.

        At least 1, so that no row attends to nothing.
        """
        after = np.ones((len(self.layer_names), padded), np.int32)
        stored = np.zeros(after.shape, bool)
        for index, (request_id, computed, tokens) in enumerate(rows):
            state = self.states[request_id]
            cuts_prompt = computed < state.prompt_len and len(state.keep_masks) < len(self.layer_names)
            if tokens != 1 or cuts_prompt:
                raise UnsupportedPlan("a graph of the whole model does not cut prompts", "cudagraph_mode")
            before, lens = state.kv_lens(computed), state.kv_lens(computed + 1)
            stored[:, index] = lens > before
            after[:, index] = np.maximum(lens, 1)
        return after, stored

    def _refill_slots(
        self,
        layers: Sequence[int],
        is_stored: Int[Tensor, "layers padded"],
        block_table: Int[Tensor, "padded blocks"],
        block_size: int,
    ) -> None:
        """Fill the slots of layers that are in one group of the KV cache."""
        count = len(block_table)
        last = self.seq_lens[layers, :count].long() - 1
        rows = torch.arange(count, device=block_table.device)
        slots = block_table[rows, last // block_size].long() * block_size + last % block_size
        self.slots[layers, :count] = torch.where(is_stored.bool(), slots, PADDING_SLOT)

    def _common(
        self, batch: Any, layer: int, kv_lens: Int[np.ndarray, " padded"], block_table: Tensor, max_len: int
    ) -> Any:
        padded = len(kv_lens)
        return compat.CommonAttentionMetadata(
            query_start_loc=batch.query_start_loc[: padded + 1],
            query_start_loc_cpu=torch.from_numpy(batch.query_start_loc_np[: padded + 1]),
            seq_lens=self.seq_lens[layer, :padded],
            seq_lens_cpu_upper_bound=torch.from_numpy(kv_lens),
            num_reqs=padded,
            num_actual_tokens=padded,
            max_query_len=1,
            max_seq_len=max_len,
            block_table_tensor=block_table,
            slot_mapping=self.slots[layer, :padded],
            causal=True,
        )

    def _builder(self, layer: int) -> BuildMetadata:
        """A builder for one layer: requests with plans of their own may hold another number of tokens in any layer."""
        name = self.layer_names[layer]
        if name not in self._builders:
            self._builders[name] = self.batches.metadata_builder(name)
        return self._builders[name]
