"""LoRA adapters while later layers run on fewer tokens than vLLM has mapped to the adapters of their requests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np

from fastav.engines.vllm import compat
from fastav.engines.vllm.plugin.packed_batch import PackedBatch
from fastav.errors import UnsupportedPlan

Update = Callable[[int], None]


@contextmanager
def following_cuts(runner: Any, batch: PackedBatch, update: Update) -> Iterator[Update]:
    """A function that prepares a step for a layer that cuts it: as `update`, and with adapters of the tokens that stay.

    Requests are host integers, and so are the numbers of their tokens, so that no step waits for its device.
    Raises: UnsupportedPlan if vLLM keeps its adapters elsewhere.
    """
    if runner.lora_config is None:
        yield update
        return
    manager = getattr(getattr(runner, "lora_manager", None), "_adapter_manager", None)
    if manager is None:
        raise UnsupportedPlan(
            "this model runner of vLLM keeps LoRA adapters where fastav does not look", "leave them out"
        )
    whole = manager._last_mapping
    if whole is None:  # no request has had an adapter yet
        yield update
        return
    starts = list(accumulate((row.num_tokens for row in batch.rows), initial=0))
    adapters = np.array([whole.index_mapping[start] for start in starts[:-1]])  # of each request

    def update_both(layer: int) -> None:
        update(layer)
        geometry = batch.geometry(layer)
        counts = np.diff(geometry.query_start_loc)
        tokens = adapters[geometry.request_indices].repeat(counts)
        mapping = compat.LoRAMapping(
            tuple(tokens.tolist()), whole.prompt_mapping, is_prefill=whole.is_prefill, type=whole.type
        )
        manager._set_adapter_mapping(mapping)

    try:
        yield update_both
    finally:
        manager._set_adapter_mapping(whole)
