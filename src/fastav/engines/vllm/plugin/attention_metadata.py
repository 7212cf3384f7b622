"""Attention metadata and cache slots for the packed tokens of each layer, from the backend's own builders."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastav.engines.vllm import compat
from fastav.engines.vllm.plugin.batches import Batches, BuildMetadata
from fastav.engines.vllm.plugin.packed_batch import Geometry, PackedBatch, geometry
from fastav.transfer import upload

PADDING_SLOT = -1  # of a token that is not stored


class PackedMetadata:
    """Builds the metadata of packed batches.

    batches: of the model runner. layer_names: of the decoder, in order.
    """

    def __init__(self, batches: Batches, layer_names: Sequence[str]) -> None:
        self.batches, self.layer_names = batches, layer_names
        self._builders: dict[str, tuple[BuildMetadata, int]] = {}

    @contextmanager
    def override(self, context: Any, batch: PackedBatch) -> Iterator[Any]:
        """Replace the forward context by a copy, whose metadata the yielded function updates.

        The function takes a cut layer and updates the layers from there to the next cut; without an argument, all.
        """
        own = self._copied(context)
        stages = dict(pairwise([*batch.cut_layers, len(self.layer_names)]))

        def update(cut_layer: int | None = None) -> None:
            for first, end in stages.items() if cut_layer is None else [(cut_layer, stages[cut_layer])]:
                where = batch.geometry(first)
                for names in self._by_kv_group(self.layer_names[first:end]):
                    width = len(context.slot_mapping[names[0]]) if cut_layer is None else len(where.batch_indices)
                    metadata, slots = self.build(names[0], where, width)
                    for name in names:
                        own.attn_metadata[name], own.slot_mapping[name] = metadata, slots

        with compat.override_forward_context(own):
            yield update

    @contextmanager
    def override_slice(self, context: Any, layers: range, where: Geometry) -> Iterator[None]:
        """Replace the forward context by a copy for some layers that run on tokens of one request."""
        own = self._copied(context)
        self._set(own, layers, where)
        with compat.override_forward_context(own):
            yield

    @contextmanager
    def override_uncut(self, context: Any, batch: PackedBatch, num_tokens: Sequence[int]) -> Iterator[None]:
        """Replace the forward context by a copy for all layers, which run on so many tokens of each request."""
        own = self._copied(context)
        own.cudagraph_runtime_mode = compat.CUDAGraphMode.NONE  # graphs are of the whole batch's size
        for first, end in pairwise(sorted({0, *batch.cut_layers, len(self.layer_names)})):
            self._set(own, range(first, end), geometry(num_tokens, [row.kv_len(first) for row in batch.rows]))
        with compat.override_forward_context(own):
            yield

    def _copied(self, context: Any) -> Any:
        own = copy(context)
        own.attn_metadata, own.slot_mapping = dict(context.attn_metadata), dict(context.slot_mapping)
        return own

    def _set(self, context: Any, layers: range, where: Geometry) -> None:
        for names in self._by_kv_group([self.layer_names[layer] for layer in layers]):
            metadata, slots = self.build(names[0], where, len(where.batch_indices))
            for name in names:
                context.attn_metadata[name], context.slot_mapping[name] = metadata, slots

    def _by_kv_group(self, layer_names: Sequence[str]) -> Iterator[list[str]]:
        """Layers, in order, by the group of the KV cache that they are in."""
        for group in self.batches.kv_groups():
            if members := [name for name in layer_names if name in group]:
                yield members

    def build(self, layer_name: str, where: Geometry, width: int) -> tuple[Any, Tensor]:
        """The metadata and the slots of a layer and of those that share them.

        width: tokens that the layer runs on, with those that only pad the batch.
        """
        build, group = self._builder(layer_name)
        size, device = self.batches.block_size(group), self.batches.device
        table = self.batches.block_table(group)[upload(where.request_indices, device)]
        rows, positions = upload(where.batch_indices, device), upload(where.positions, device)
        slots = table[rows, positions // size].long() * size + positions % size
        slots = nn.functional.pad(slots, (0, width - len(slots)), value=PADDING_SLOT)
        query_start_loc, seq_lens = where.query_start_loc.astype(np.int32), where.seq_lens.astype(np.int32)
        common = compat.CommonAttentionMetadata(
            query_start_loc=upload(query_start_loc, device),
            query_start_loc_cpu=torch.from_numpy(query_start_loc),
            seq_lens=upload(seq_lens, device),
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
            num_reqs=len(where.request_indices),
            num_actual_tokens=len(where.batch_indices),
            max_query_len=int(np.diff(query_start_loc).max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=table,
            slot_mapping=slots,
            causal=True,
        )
        return build(common), slots

    def _builder(self, layer_name: str) -> tuple[BuildMetadata, int]:
        """A metadata builder for a layer and those that share its metadata, and the index of their KV cache group.

        Each has a builder to itself: a builder may own the memory of its metadata.
        """
        if layer_name not in self._builders:
            (group,) = (index for index, names in enumerate(self.batches.kv_groups()) if layer_name in names)
            self._builders[layer_name] = self.batches.metadata_builder(layer_name), group
        return self._builders[layer_name]
