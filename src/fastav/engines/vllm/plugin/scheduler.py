"""vLLM's scheduler with a KV cache in groups of layers: it tells them how many tokens of each request they store."""

from collections.abc import Sequence
from functools import cache
from math import ceil
from typing import Any

from fastav.engines.vllm.compat import AsyncScheduler, Scheduler, init_logger, num_computed_tokens
from fastav.engines.vllm.plugin.kv_cache import HeldManager, KVGroupManager
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
            self._at_once: set[str] = set()
            self._plans = plan_cache(self.vllm_config)
            self._token_budget, self._late_is_free = self.max_num_scheduled_tokens, False
            self.need_mamba_block_aligned_split |= self._plans.chunking is not None
            managers = self.kv_cache_manager.coordinator.single_type_managers
            for manager in managers:
                manager.request_states, manager.at_once = self.request_states, self._at_once
            if self.perf_metrics is not None:
                pruning = self._plans.default.pruning
                self.perf_metrics = PrunedPerfMetrics(self.vllm_config, pruning, self.request_states)
            example = example_layout(self._plans.default, self.max_model_len)
            specs = [manager.kv_cache_spec for manager in managers if not isinstance(manager, HeldManager)]
            _log_capacity(self._plans.default, example, specs, self.kv_cache_manager.block_pool.get_num_free_blocks())

        def add_request(self, request: Any) -> None:
            runtime = self._plans.get(plan_override(request.sampling_params))
            inputs = layout_inputs(runtime.pruning.adapter, request)
            self.request_states[request.request_id] = runtime.request_state(inputs)
            super().add_request(request)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            self._begin_step()
            output = super().schedule(*args, **kwargs)
            for new in output.scheduled_new_reqs:
                # vLLM leaves out media that the prefix cache covers, but layouts are read from them, and a prompt that
                # is preempted may not find them there again
                new.mm_features = self.requests[new.req_id].mm_features
            self._require_blocks(output)
            if self.perf_metrics is not None:
                self.perf_metrics.schedule(output)
            return output

        def _get_local_prefix_cache_hit(self, request: Any) -> Any:
            """vLLM's lookup of a prefix, in the groups whose blocks the request's plan can reuse."""
            state, coordinator = self.request_states[request.request_id], self.kv_cache_manager.coordinator
            if not self.cache_config.enable_prefix_caching:
                return super()._get_local_prefix_cache_hit(request)
            managers, every = coordinator.single_type_managers, coordinator.attention_groups
            own = [
                group
                for group in every
                if all(
                    not isinstance(managers[i], KVGroupManager) or managers[i].is_reusable(request.request_id)
                    for i in group.group_ids
                )
            ]
            if not own or (not state.is_unpruned and state.max_reused is None):
                return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
            coordinator.attention_groups = own
            try:
                blocks, num_tokens, *_ = super()._get_local_prefix_cache_hit(request)
            finally:
                coordinator.attention_groups = every
            if state.max_reused is not None and num_tokens > state.max_reused:
                count = state.max_reused // self.block_size
                num_tokens = count * self.block_size
                blocks = self.kv_cache_manager.create_kv_cache_blocks(tuple(list(one[:count]) for one in blocks.blocks))
            return blocks, num_tokens, 0, False

        def _begin_step(self) -> None:
            """Leave room in the step's budget for a late step of a prompt in chunks."""
            if (chunking := self._plans.chunking) is None:
                return
            budget = max(1, self._token_budget - chunking.max_tokens)
            self._late_is_free = any(self._may_run_late(one, budget - n) for n, one in enumerate(self.running))
            self.max_num_scheduled_tokens = budget if self._late_is_free else self._token_budget

        def _may_run_late(self, request: Any, room: int) -> bool:
            """Whether a prompt comes to its late steps in the next step, with room for so many tokens."""
            late = self.request_states[request.request_id].late
            if late is None or (computed := request.num_computed_tokens) >= late.prompt_len:
                return False
            return room >= (1 if computed > late.first_withheld else late.prompt_len - computed)

        def _mamba_block_aligned_split(
            self, request: Any, num_new_tokens: int, num_local: int = 0, num_external: int = 0
        ) -> int:
            """vLLM's hook into the number of tokens that it schedules of a request: as its late schedule says.

            0 makes the request wait for another step.
            """
            state = self.request_states[request.request_id]
            computed = request.num_computed_tokens + num_local + num_external
            if state.is_unpruned or computed >= state.prompt_len:
                return num_new_tokens
            if state.late is None:
                return num_new_tokens if self._may_start(state, num_new_tokens) else 0
            if not state.comes_in_chunks(computed, num_new_tokens):
                self._at_once.add(request.request_id)
                return num_new_tokens
            self._at_once.discard(request.request_id)
            limited = state.late.limit(computed, num_new_tokens, late=self._late_is_free)
            if computed + limited > state.late.first_withheld:
                self._late_is_free = False
            return limited

        def _may_start(self, state: RequestState, num_tokens: int) -> bool:
            """Whether a prompt can run on so many tokens, if its plan needs whole prompts."""
            return not state.runtime.needs_whole_prompts or num_tokens >= state.prompt_len

        def _try_schedule_encoder_inputs(
            self, request: Any, num_computed: int, num_new_tokens: int, budget: int, *args: Any, **kwargs: Any
        ) -> Any:
            """vLLM's scheduling of encoders, which may leave fewer tokens of a prompt: then it does not run at once."""
            scheduled = super()._try_schedule_encoder_inputs(
                request, num_computed, num_new_tokens, budget, *args, **kwargs
            )
            state = self.request_states[request.request_id]
            if not state.is_unpruned and num_computed < state.prompt_len and scheduled[1] < num_new_tokens:
                self._at_once.discard(request.request_id)
                if not self._may_start(state, scheduled[1]):
                    return [], 0, budget, [], []
            return scheduled

        def _require_blocks(self, output: Any) -> None:
            """Refuse a step in which a group has too many or too few blocks for a request.  Raises: PlanNotApplied."""
            computed = num_computed_tokens(output)
            managers = self.kv_cache_manager.coordinator.single_type_managers
            groups = [manager for manager in managers if isinstance(manager, KVGroupManager)]
            for request_id, tokens in output.num_scheduled_tokens.items():
                end = computed[request_id] + tokens
                has_run = end > self.request_states[request_id].prompt_len
                for group in groups:
                    if has_run and isinstance(group, HeldManager):
                        continue  # whose blocks go once the prompt's last step has ended, perhaps not yet
                    expected = group.num_blocks(request_id, end)
                    if (blocks := len(group.req_to_blocks[request_id])) != expected:
                        layer = group.kv_cache_spec.first_layer
                        raise not_applied(
                            f"layer {layer} has {blocks} blocks for a request, and by the plan {expected}"
                        )

        def _free_blocks(self, request: Any) -> None:
            super()._free_blocks(request)
            self._at_once.discard(request.request_id)
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
