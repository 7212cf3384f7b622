"""LoRA adapters while later layers run on fewer tokens than vLLM has mapped to the adapters of their requests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
from jaxtyping import Int

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
    if (adapters := _Adapters.of(runner, batch)) is None:
        yield update
        return

    def update_both(layer: int) -> None:
        update(layer)
        geometry = batch.geometry(layer)
        adapters.map(geometry.request_indices, np.diff(geometry.query_start_loc))

    try:
        yield update_both
    finally:
        adapters.restore()


@contextmanager
def adapters_of_rows(
    runner: Any, batch: PackedBatch, rows: Int[np.ndarray, " rows"], num_tokens: Int[np.ndarray, " rows"]
) -> Iterator[None]:
    """Let layers run on so many tokens of some requests of a batch.

    Raises: UnsupportedPlan if vLLM keeps its adapters elsewhere.
    """
    if (adapters := _Adapters.of(runner, batch)) is None:
        yield
        return
    adapters.map(rows, num_tokens)
    try:
        yield
    finally:
        adapters.restore()


class _Adapters:
    """The adapters of a step.

    manager, whole: vLLM's, and its mapping of the batch. of_rows: the adapter of each request, as the mapping has it.
    """

    def __init__(self, manager: Any, whole: Any, of_rows: Int[np.ndarray, " requests"]) -> None:
        self._manager, self._whole, self._of_rows = manager, whole, of_rows

    @classmethod
    def of(cls, runner: Any, batch: PackedBatch) -> "_Adapters | None":
        """The adapters of a batch; None if no request has had one yet."""
        if runner.lora_config is None:
            return None
        manager = getattr(getattr(runner, "lora_manager", None), "_adapter_manager", None)
        if manager is None:
            raise UnsupportedPlan(
                "this model runner of vLLM keeps LoRA adapters where fastav does not look", "leave them out"
            )
        if (whole := manager._last_mapping) is None:
            return None
        starts = list(accumulate((row.num_tokens for row in batch.rows), initial=0))
        return cls(manager, whole, np.array([whole.index_mapping[start] for start in starts[:-1]]))

    def map(self, rows: Int[np.ndarray, " rows"], num_tokens: Int[np.ndarray, " rows"]) -> None:
        """Select adapters for so many tokens of these requests, in order."""
        whole, tokens = self._whole, self._of_rows[rows].repeat(num_tokens)
        self._manager._set_adapter_mapping(
            compat.LoRAMapping(
                tuple(tokens.tolist()), whole.prompt_mapping, is_prefill=whole.is_prefill, type=whole.type
            )
        )

    def restore(self) -> None:
        """Select adapters for the batch again."""
        self._manager._set_adapter_mapping(self._whole)
