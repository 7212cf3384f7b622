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
from fastav.engines.vllm.plugin.packed_batch import Geometry, PackedBatch, upload

PADDING_SLOT = -1  # of a token that is not stored


class PackedMetadata:
    """Builds the metadata of packed batches.

    runner: vLLM's model runner. layer_names: of the decoder, in order.
    """

    def __init__(self, runner: Any, layer_names: Sequence[str]) -> None:
        self.runner, self.layer_names = runner, layer_names
        self._builders: dict[str, tuple[Any, int]] = {}

    @contextmanager
    def override(self, context: Any, batch: PackedBatch) -> Iterator[Any]:
        """Replace the forward context by a copy, whose metadata the yielded function updates.

        The function takes a cut layer and updates the layers from there to the next cut; without an argument, all.
        """
        own = copy(context)
        own.attn_metadata, own.slot_mapping = dict(context.attn_metadata), dict(context.slot_mapping)
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

    def _by_kv_group(self, layer_names: Sequence[str]) -> Iterator[list[str]]:
        """Layers, in order, by the group of the KV cache that they are in."""
        for group in self.runner.kv_cache_config.kv_cache_groups:
            if members := [name for name in layer_names if name in group.layer_names]:
                yield members

    def build(self, layer_name: str, where: Geometry, width: int) -> tuple[Any, Tensor]:
        """The metadata and the slots of a layer and of those that share them.

        width: tokens that the layer runs on, with those that only pad the batch.
        """
        builder, group = self._builder(layer_name)
        blocks, device = self.runner.input_batch.block_table[group], self.runner.device
        table = blocks.get_device_tensor(self.runner.input_batch.num_reqs)[upload(where.request_indices, device)]
        rows, positions = upload(where.batch_indices, device), upload(where.positions, device)
        size = blocks.block_size
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
        return builder.build(0, common), slots

    def _builder(self, layer_name: str) -> tuple[Any, int]:
        """A metadata builder for a layer and those that share its metadata, and the index of their KV cache group.

        Each has a builder to itself: a builder may own the memory of its metadata.
        """
        if layer_name not in self._builders:
            groups = [group for groups in self.runner.attn_groups for group in groups]
            (group,) = (group for group in groups if layer_name in group.layer_names)
            size = self.runner.input_batch.block_table[group.kv_cache_group_id].block_size
            spec, builder_class = group.kv_cache_spec.copy_with_new_block_size(size), group.backend.get_builder_cls()
            builder = builder_class(spec, [layer_name], self.runner.vllm_config, self.runner.device)
            self._builders[layer_name] = builder, group.kv_cache_group_id
        return self._builders[layer_name]
