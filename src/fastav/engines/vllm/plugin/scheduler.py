"""vLLM's scheduler with a KV cache in groups of layers: it tells them how many tokens of each request they store."""

from collections.abc import Sequence
from functools import cache
from math import ceil
from typing import Any

from fastav.engines.vllm.compat import AsyncScheduler, Scheduler, init_logger, num_computed_tokens
from fastav.engines.vllm.plugin.kv_cache import KVGroupManager
from fastav.engines.vllm.plugin.kv_groups import example_layout
from fastav.engines.vllm.plugin.perf import PrunedPerfMetrics
from fastav.engines.vllm.plugin.request_state import PlanRuntime, RequestState
from fastav.engines.vllm.plugin.requests import layout_inputs, plan_cache, plan_override
from fastav.layout import Layout
from fastav.pruning.verification import not_applied

log = init_logger("vllm.fastav")


def create_scheduler(vllm_config: Any, **kwargs: Any) -> Any:
    """The scheduler that the configuration names, with pruning."""
    base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return _pruning_scheduler(base)(vllm_config=vllm_config, **kwargs)


@cache
def _pruning_scheduler(base: Any) -> type:
    class PruningScheduler(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.request_states: dict[str, RequestState] = {}
            self._plans = plan_cache(self.vllm_config)
            managers = self.kv_cache_manager.coordinator.single_type_managers
            for manager in managers:
                manager.request_states = self.request_states
            if self.perf_metrics is not None:
                pruning = self._plans.default.pruning
                self.perf_metrics = PrunedPerfMetrics(self.vllm_config, pruning, self.request_states)
            example = example_layout(self._plans.default, self.max_model_len)
            specs = [manager.kv_cache_spec for manager in managers]
            _log_capacity(self._plans.default, example, specs, self.kv_cache_manager.block_pool.get_num_free_blocks())

        def add_request(self, request: Any) -> None:
            runtime = self._plans.get(plan_override(request.sampling_params))
            inputs = layout_inputs(runtime.pruning.adapter, request)
            self.request_states[request.request_id] = runtime.request_state(inputs)
            super().add_request(request)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            output = super().schedule(*args, **kwargs)
            self._require_blocks(output)
            if self.perf_metrics is not None:
                self.perf_metrics.schedule(output)
            return output

        def _require_blocks(self, output: Any) -> None:
            """Refuse a step in which a group has too many or too few blocks for a request.  Raises: PlanNotApplied."""
            computed = num_computed_tokens(output)
            managers = self.kv_cache_manager.coordinator.single_type_managers
            groups = [manager for manager in managers if type(manager) is KVGroupManager]
            for request_id, tokens in output.num_scheduled_tokens.items():
                for group in groups:
                    layer, size = group.kv_cache_spec.first_layer, group.kv_cache_spec.block_size
                    kv_len = self.request_states[request_id].kv_len(layer, computed[request_id] + tokens)
                    if (blocks := len(group.req_to_blocks[request_id])) != ceil(kv_len / size):
                        raise not_applied(
                            f"layer {layer} has {blocks} blocks of {size} for a request of {kv_len} tokens"
                        )

        def _free_blocks(self, request: Any) -> None:
            super()._free_blocks(request)
            del self.request_states[request.request_id]

    return PruningScheduler


def _log_capacity(runtime: PlanRuntime, example: Layout, specs: Sequence[Any], free: int) -> None:
    """Log how many typical prompts fit into the cache; vLLM's own figure is for unpruned prompts."""
    kv_lens = runtime.pruning.plan.tokens(example, runtime.depth)
    unpruned = sum(ceil(len(example) / spec.block_size) for spec in specs)
    pruned = sum(ceil(kv_lens[getattr(spec, "first_layer", 0)] / spec.block_size) for spec in specs)
    counts = (f"{count:,}" for count in (len(example), pruned, unpruned))
    capacity = "fastav: a typical prompt of %s tokens takes %s blocks, not %s: there is room for %.1f at once, not %.1f"
    log.info(capacity, *counts, free / pruned, free / unpruned)
