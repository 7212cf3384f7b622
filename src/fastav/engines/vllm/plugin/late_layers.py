"""Layers behind the first scored cut, for prompts in chunks: their slices run after the batch, one by one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastav.engines.vllm.plugin.attention_metadata import PackedMetadata
from fastav.engines.vllm.plugin.batches import Batches, ScheduledRequest
from fastav.engines.vllm.plugin.chunked_prefill import ChunkedPrefill
from fastav.engines.vllm.plugin.held_states import BlockStore, HeldPages
from fastav.engines.vllm.plugin.late_schedule import Slice
from fastav.engines.vllm.plugin.packed_batch import BatchRow, PackedBatch, geometry
from fastav.engines.vllm.plugin.request_state import RequestState
from fastav.engines.vllm.plugin.tensor_parallel import TensorParallel


class _Running(NamedTuple):
    """A prompt that has begun.  stores: where its states are, in the order of `LateLayers._pages`."""

    chunks: ChunkedPrefill
    stores: tuple[BlockStore, BlockStore]


class LateLayers:
    """Runs prompts in chunks through a decoder's late layers.

    held_layers: by name, the layers of the KV cache that hold states; set before it is allocated.
    """

    def __init__(self, decoder: Any, batches: Batches, metadata: PackedMetadata, ranks: TensorParallel) -> None:
        self._decoder, self._batches, self._metadata, self._ranks = decoder, batches, metadata, ranks
        self.held_layers: dict[str, Any] = {}
        self._running: dict[str, _Running] = {}

    def row(self, index: int, state: RequestState, scheduled: ScheduledRequest) -> BatchRow:
        """A request of the batch.  index: its row."""
        request_id, num_computed, num_tokens = scheduled
        if not state.comes_in_chunks(num_computed, num_tokens):
            return BatchRow(state, num_computed, num_tokens)
        if request_id not in self._running:
            self._running[request_id] = self._begin(request_id, state, num_computed)
        chunks, stores = self._running[request_id]
        for store, pages in zip(stores, self._pages, strict=True):
            store.enter_step({group: self._batches.block_table(group)[index] for group in pages.groups})
        return BatchRow(state, num_computed, num_tokens, chunks)

    def _begin(self, request_id: str, state: RequestState, num_reused: int) -> _Running:
        assert state.late is not None
        assert state.prefill is not None
        prompt, buffer = (BlockStore(pages) for pages in self._pages)
        chunks = ChunkedPrefill(
            state.late,
            state.prefill,
            self._batches.prompt_positions(request_id, state.prompt_len),
            prompt,
            buffer,
            self._ranks,
            self._decoder.layers[0].self_attn.total_num_kv_heads,
            num_reused,
        )
        return _Running(chunks, (prompt, buffer))

    def drop(self, request_id: str) -> None:
        """Forget a request whose prompt has run, or which has ended."""
        self._running.pop(request_id, None)

    def run(
        self,
        context: Any,
        batch: PackedBatch,
        out: Tensor,
        adapters_of_rows: Callable[[Any, Any], AbstractContextManager[None]],
    ) -> None:
        """Run the late slices of a batch, and put the states of prompts' last tokens into `out`.

        adapters_of_rows: selects LoRA adapters for rows, given their indices and numbers of tokens.
        """
        for index, row in enumerate(batch.rows):
            if (chunks := row.chunks) is None:
                continue
            for one in chunks.late.slices(row.num_computed, row.num_tokens):
                chunks.begin(one)
                with adapters_of_rows(np.array([index]), np.array([one.end - one.start])):
                    hidden = self._run_slice(context, chunks, index, one)
                if one.stage == len(chunks.late.stages) - 1:
                    out[batch.last_index(index)] = hidden[-1]
                else:
                    chunks.hold(hidden)

    def _run_slice(self, context: Any, chunks: ChunkedPrefill, row: int, one: Slice) -> Tensor:
        """The hidden states after a slice's layers; after the decoder's norm if these are its last."""
        first, end, _ = chunks.late.stages[one.stage]
        hidden, positions = chunks.states(one), chunks.positions_of(one)
        residual: Any = None
        where = geometry([0] * row + [one.end - one.start], [0] * row + [one.start])
        with self._metadata.override_slice(context, range(first, end), where):
            for index in range(first, end):
                layer = self._decoder.layers[index]
                with self._observe(chunks, index, layer):
                    hidden, residual = layer(positions, hidden, residual)
        if end == len(self._decoder.layers):
            return self._decoder.norm(hidden, residual)[0]
        return hidden + residual

    @contextmanager
    def _observe(self, chunks: ChunkedPrefill, index: int, layer: Any) -> Iterator[None]:
        """Record the signals that the next cut needs of a layer's attention."""
        if not (signals := chunks.signals(index)):
            yield
            return

        def record(_: Any, inputs: tuple[Tensor, ...]) -> None:
            query, key = by_head(layer.self_attn, inputs)
            chunks.store_keys(key)
            chunks.observe(signals, query, key, layer.self_attn.scaling)

        hook = layer.self_attn.attn.register_forward_pre_hook(record)
        try:
            yield
        finally:
            hook.remove()

    # --- memory for states

    @property
    def held_bytes(self) -> int:
        """Bytes that are held of a token: a hidden state, and one layer's keys of this rank."""
        return (len(self._decoder.norm.weight) + self._key_features) * self._decoder.norm.weight.itemsize

    @property
    def _key_features(self) -> int:
        attention = self._decoder.layers[0].self_attn
        return attention.num_kv_heads * attention.head_dim

    @cached_property
    def _pages(self) -> tuple[HeldPages, HeldPages]:
        """The memory for states that enter the held layer, and for those between late steps."""
        groups, like = self._batches.kv_groups(), self._decoder.norm.weight

        def pages(*, is_buffer: bool) -> HeldPages:
            layers = {name: layer for name, layer in self.held_layers.items() if layer.spec.is_buffer is is_buffer}
            caches = [
                (group, layers[name].kv_cache) for group, names in enumerate(groups) for name in names if name in layers
            ]
            spec = next(iter(layers.values())).spec
            return HeldPages(
                caches,
                block_size=self._batches.block_size(caches[0][0]),
                features=spec.page_size_bytes // (spec.block_size * like.itemsize),
                key_features=self._key_features,
                like=like,
            )

        return pages(is_buffer=False), pages(is_buffer=True)


def by_head(attention: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A layer's queries and keys, [tokens, heads, head], from what its attention is given."""
    query, key = inputs[:2]
    return query.view(-1, attention.num_heads, attention.head_dim), key.view(
        -1, attention.num_kv_heads, attention.head_dim
    )
