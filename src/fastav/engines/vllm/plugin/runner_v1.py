"""The batches of vLLM's model runner V1, which keeps its requests and one batch that it changes from step to step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fastav.engines.vllm.plugin.batches import BuildMetadata, RequestListener, ScheduledRequest
from fastav.errors import UnsupportedPlan


class BatchesV1:
    """Implements `Batches`.  runner: vLLM's. listener: is told which requests begin and end."""

    def __init__(self, runner: Any, listener: RequestListener) -> None:
        self._runner, self._listener = runner, listener
        self._prompt_lens: dict[str, int] = {}  # of the requests that the listener knows
        self._in_step = False
        self._started: set[str] = set()  # in the running step, until the listener knows

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._runner.device

    @contextmanager
    def step(self, scheduler_output: Any) -> Iterator[None]:
        """A step of requests."""
        new, resumed = scheduler_output.scheduled_new_reqs, scheduler_output.scheduled_cached_reqs.resumed_req_ids
        self._started = {*(request.req_id for request in new), *resumed}
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    @property
    def is_armed(self) -> bool:
        """Whether a step runs: the runner changes its batch there only."""
        return self._in_step

    def rows(self) -> list[ScheduledRequest]:
        """The requests of the batch, in its order.

        Raises: UnsupportedPlan for a prompt that has become longer.
        """
        batch = self._runner.input_batch
        num_tokens = np.diff(self._runner.query_start_loc.np[: batch.num_reqs + 1]).tolist()
        num_computed = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
        rows = [ScheduledRequest(*row) for row in zip(batch.req_ids, num_computed, num_tokens, strict=True)]
        self._notify(rows)
        return rows

    def _notify(self, rows: Sequence[ScheduledRequest]) -> None:
        """Tell the listener what has changed since the last batch."""
        requests = self._runner.requests
        for ended in self._prompt_lens.keys() - requests.keys():
            del self._prompt_lens[ended]
            self._listener.end_request(ended)
        for row in rows:
            request = requests[row.request_id]
            if row.request_id in self._started:
                self._started.remove(row.request_id)
                self._listener.start_request(row.request_id, request)
                self._prompt_lens[row.request_id] = request.num_prompt_tokens
            elif self._prompt_lens[row.request_id] != request.num_prompt_tokens:
                raise UnsupportedPlan("a prompt grew after it had run, as streamed input does", "send whole prompts")

    def prompt_positions(self, request_id: str, length: int) -> Int[Tensor, "*axes tokens"]:
        """The positions of a prompt's tokens."""
        positions = self._runner.requests[request_id].mrope_positions
        if positions is None:
            return torch.arange(length, device=self.device)
        return positions[:, :length].to(self.device)

    def kv_groups(self) -> Sequence[Sequence[str]]:
        """The names of the layers in each group of the KV cache."""
        return [group.layer_names for group in self._runner.kv_cache_config.kv_cache_groups]

    def block_table(self, group: int) -> Int[Tensor, "requests blocks"]:
        """The blocks of the batch's requests, in the size that the backend's kernel takes."""
        batch = self._runner.input_batch
        return batch.block_table[group].get_device_tensor(batch.num_reqs)

    def block_size(self, group: int) -> int:
        """How many tokens each of these blocks holds."""
        return self._runner.input_batch.block_table[group].block_size

    def metadata_builder(self, layer_name: str) -> BuildMetadata:
        """A new builder of a layer's attention metadata."""
        groups = [group for groups in self._runner.attn_groups for group in groups]
        (group,) = (group for group in groups if layer_name in group.layer_names)
        spec = group.kv_cache_spec.copy_with_new_block_size(self.block_size(group.kv_cache_group_id))
        builder_class = group.backend.get_builder_cls()
        builder = builder_class(spec, [layer_name], self._runner.vllm_config, self._runner.device)
        return partial(builder.build, 0)  # tokens that all requests share
