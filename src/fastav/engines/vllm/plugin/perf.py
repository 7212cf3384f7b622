"""vLLM's estimates of FLOPs and memory traffic (`--enable-mfu-metrics`), for the tokens that layers run on.

vLLM counts every scheduled token in every layer. Here its own formulas get the tokens and the cache of each layer. The
language model's head is counted once, as in vLLM: pruning never drops the token that is sampled from.
"""

from collections import Counter
from collections.abc import Mapping
from copy import copy
from typing import Any

import numpy as np

from fastav.engines.vllm import compat
from fastav.engines.vllm.guards import PruningConfig
from fastav.engines.vllm.plugin.request_state import RequestState

HEAD = "unembed"  # vLLM's name of the part that does not belong to a layer


class PrunedPerfMetrics:
    """Stands in for vLLM's `ModelMetrics` in a scheduler.

    config: vLLM's. states: of all requests in the scheduler, by id.
    """

    def __init__(self, config: Any, pruning: PruningConfig, states: Mapping[str, RequestState]) -> None:
        # vLLM does not look for the decoder's dimensions inside a thinker's configuration, and would assume some
        config = copy(config)
        config.model_config = copy(config.model_config)
        config.model_config.hf_config = pruning.config
        self._metrics, self._states, self._depth = compat.ModelMetrics(config), states, pruning.depth
        self._scheduled: dict[int, Any] = {}

    def is_enabled(self) -> bool:
        """Whether vLLM has formulas for the model."""
        return self._metrics.is_enabled()

    def schedule(self, output: Any) -> None:
        """Estimate a step when it is scheduled, because requests may be aborted before it ends."""
        if self.is_enabled():
            self._scheduled[id(output)] = self._estimate(output)

    def get_step_perf_stats_per_gpu(self, scheduler_output: Any) -> Any:
        """The estimate of a step."""
        return self._scheduled.pop(id(scheduler_output))

    def _estimate(self, output: Any) -> Any:
        stats = self._metrics.get_step_perf_stats_per_gpu(output)  # of all tokens, for what stays as it is
        contexts = self._contexts(output)
        for name, breakdown in (
            ("num_flops_per_gpu", "get_num_flops_breakdown"),
            ("num_read_bytes_per_gpu", "get_read_bytes_breakdown"),
            ("num_write_bytes_per_gpu", "get_write_bytes_breakdown"),
        ):
            total = 0
            for context, layers in contexts.values():
                parts = getattr(self._metrics, breakdown)(context, True)
                total += sum(value for part, value in parts.items() if not part.startswith(f"{HEAD}.")) * layers
            head = getattr(self._metrics, breakdown)(self._whole(output), True)
            head_total = sum(value for part, value in head.items() if part.startswith(f"{HEAD}."))
            setattr(stats, name, head_total + total // self._depth)
        return stats

    def _contexts(self, output: Any) -> dict[tuple[Any, ...], tuple[Any, int]]:
        """What the layers run on, as vLLM's `ExecutionContext`, with the number of layers that run on the same."""
        computed, rows = compat.num_computed_tokens(output), []
        for request_id, tokens in output.num_scheduled_tokens.items():
            if tokens:
                state, done = self._states[request_id], computed[request_id]
                after = state.kv_lens(done + tokens)
                rows.append((after - state.kv_lens(done), after, self._is_prefill(output, request_id, tokens)))
        if not rows:
            return {}
        layers = np.stack([np.stack([queries, lens]) for queries, lens, _ in rows])  # [requests, 2, layers]
        counts = Counter(tuple(layers[:, :, layer].flatten().tolist()) for layer in range(self._depth))
        contexts = {}
        for key, number in counts.items():
            pairs = zip(key[::2], key[1::2], rows, strict=True)
            contexts[key] = _context([(queries, lens, prefill) for queries, lens, (_, _, prefill) in pairs]), number
        return contexts

    def _whole(self, output: Any) -> Any:
        """The step without pruning."""
        computed = compat.num_computed_tokens(output)
        scheduled = [(name, tokens) for name, tokens in output.num_scheduled_tokens.items() if tokens]
        return _context(
            [(tokens, computed[name] + tokens, self._is_prefill(output, name, tokens)) for name, tokens in scheduled]
        )

    @staticmethod
    def _is_prefill(output: Any, request_id: str, tokens: int) -> bool:
        """Whether vLLM counts a request among the prefills: it is new, or runs several tokens."""
        return tokens > 1 or any(new.req_id == request_id for new in output.scheduled_new_reqs)


def _context(rows: list[tuple[int, int, bool]]) -> Any:
    """rows: of each request, the tokens that run, those in the cache after them, and whether it is a prefill."""
    context = compat.ExecutionContext()
    for tokens, length, is_prefill in rows:
        if tokens:
            context.add(tokens, length, is_prefill=is_prefill)
    return context
