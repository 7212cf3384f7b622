"""vLLM's worker for this platform, which prunes the model that it loads.

vLLM imports this module in its worker processes only.
"""

from functools import cached_property
from typing import Any

from fastav.engines.vllm import compat
from fastav.engines.vllm.plugin.decoder import DecoderPruner, prune_decoder
from fastav.engines.vllm.plugin.held_states import held_layer
from fastav.engines.vllm.plugin.kv_cache import partition_kv_cache
from fastav.engines.vllm.plugin.requests import require_plugin
from fastav.engines.vllm.plugin.seeds import rewind_seeds


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
        specs = partition_kv_cache(
            super().get_kv_cache_spec(), pruner.layer_names, pruner.plans.default, max_len, pruner.late.held_bytes
        )
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in specs.keys() - layers.keys():
            layers[name] = pruner.late.held_layers[name] = held_layer(layers[pruner.layer_names[0]], specs[name])
        return specs

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's step, checked against the plan.  Raises: PlanNotApplied, which ends the engine."""
        with self.pruner.checked_step(scheduler_output):
            return super().execute_model(scheduler_output, *args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's sampling."""
        if compat.current_platform.is_cpu() and not self.vllm_config.use_v2_model_runner:
            rewind_seeds(self.model_runner)
        return super().sample_tokens(*args, **kwargs)

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's compilation, warm-up and capture of graphs."""
        with self.pruner.warm_up():
            return super().compile_or_warm_up_model(*args, **kwargs)

    @cached_property
    def pruner(self) -> DecoderPruner:
        """Runs the decoder."""
        return prune_decoder(self.model_runner, self.vllm_config)
