"""vLLM's worker for this platform, which prunes the model that it loads.

vLLM imports this module in its worker processes only.
"""

from functools import cached_property
from typing import Any

from fastav.engines.vllm import compat
from fastav.engines.vllm.plugin.decoder import DecoderPruner, prune_decoder
from fastav.engines.vllm.plugin.kv_cache import partition_kv_cache
from fastav.engines.vllm.plugin.requests import require_plugin


class PruningWorker(compat.worker_class()):
    """A worker whose decoder is pruned, and whose KV cache is divided into groups of layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raises: FastAVError if vLLM has not loaded the plugin."""
        require_plugin()
        super().__init__(*args, **kwargs)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """vLLM's specs, divided into groups.  Raises: UnsupportedModel, UnsupportedPlan.

        vLLM calls this first after loading. An error while loading would not reach an engine whose workers are other
        processes.
        """
        pruner, max_len = self.pruner, self.vllm_config.model_config.max_model_len
        return partition_kv_cache(super().get_kv_cache_spec(), pruner.layer_names, pruner.plans.default, max_len)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's step, checked against the plan.  Raises: PlanNotApplied, which ends the engine."""
        with self.pruner.checked_step(scheduler_output):
            return super().execute_model(scheduler_output, *args, **kwargs)

    @cached_property
    def pruner(self) -> DecoderPruner:
        """Runs the decoder."""
        return prune_decoder(self.model_runner, self.vllm_config)
