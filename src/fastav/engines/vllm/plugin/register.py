"""Hooks in every process of vLLM: a configuration with a plan is checked and given our worker and scheduler.

vLLM calls `install` through its plugin system before it reads a model's configuration. Without a plan in
`additional_config` the hooks change nothing.
"""

import json
from typing import Any

from fastav.engines.vllm import compat, guards
from fastav.engines.vllm.guards import SCHEDULER, WORKER, PruningConfig, Serving
from fastav.engines.vllm.plugin.kv_groups import needs_no_prefixes
from fastav.engines.vllm.plugin.metrics import log_with
from fastav.engines.vllm.plugin.requests import check_inputs, open_admission, refuse_beam_search
from fastav.errors import PlanError
from fastav.pruning.verification import not_applied


def install() -> None:
    """Hook into the configuration of every model, and into the checks of requests; a second call does nothing.

    In an untested vLLM only `VllmConfig` is hooked, which then refuses plans.
    """
    config_class = compat.VllmConfig
    if not hasattr(config_class, "_fastav"):
        config_class._fastav = True
        config_class.__post_init__ = _check_after(config_class.__post_init__)
    if not compat.is_supported():
        return
    hooks, processor_class = compat.MODELS_CONFIG_MAP, compat.InputProcessor
    for name in {*compat.ModelRegistry.get_supported_archs(), *hooks}:
        if not isinstance(original := hooks.get(name), _ConfigHook):
            hooks[name] = _ConfigHook(original)
    if not hasattr(processor_class, "_fastav"):
        processor_class._fastav = True
        processor_class.__init__ = open_admission(processor_class.__init__)
        processor_class.process_inputs = check_inputs(processor_class.process_inputs)
        processor_class.resolve_watermarking = refuse_beam_search(processor_class.resolve_watermarking)
        compat.LoggingStatLogger.log = log_with(compat.LoggingStatLogger.log)


def _check_after(post_init: Any) -> Any:
    """Wrap the end of a configuration's construction: refuse a plan that it would not carry out."""

    def __post_init__(self: Any) -> None:  # noqa: N807
        post_init(self)
        model = self.model_config
        if model is None:
            return
        if (entry := guards.pruning_entry(self.additional_config)) is None:
            if compat.is_supported():
                _refuse_classes_without_plan(self)
            return
        compat.require_version()
        if model.is_submodel_config:  # a part of a configuration that has been checked
            return
        if self.parallel_config.worker_cls != WORKER:  # which `_ConfigHook` sets
            raise not_applied(f"vLLM did not read {entry} for {', '.join(model.architectures or ())}")
        pruning = guards.read(self.additional_config, model.hf_config)
        assert pruning is not None
        guards.check(pruning, _serving(self))  # again, as vLLM has changed settings since

    return __post_init__


def _refuse_classes_without_plan(config: Any) -> None:
    """Raises: PlanError if vLLM is to run our worker or scheduler, which need a plan."""
    for flag, named, ours in (
        ("--worker-cls", config.parallel_config.worker_cls, WORKER),
        ("--scheduler-cls", config.scheduler_config.scheduler_cls, SCHEDULER),
    ):
        if named == ours:
            raise PlanError(f"{flag} is fastav's, but no plan is configured", guards.HINT)


class _ConfigHook:
    """vLLM's hook into the configuration of one architecture: its own rules, if it has any, then ours."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def verify_and_update_model_config(self, model_config: Any) -> None:
        if self._original is not None:
            self._original.verify_and_update_model_config(model_config)

    def verify_and_update_config(self, config: Any) -> None:
        if self._original is not None:
            self._original.verify_and_update_config(config)
        if (pruning := guards.read(config.additional_config, config.model_config.hf_config)) is not None:
            compat.require_version()
            _adapt(config, pruning)
            guards.check(pruning, _serving(config))
            entry = config.additional_config["fastav"]
            guards.check_request_plans(pruning, entry)
            # the same plan in every process, even if its file changes
            config.additional_config = {
                **config.additional_config,
                "fastav": {**entry, "plan": json.loads(pruning.plan.to_json())},
            }
            config.parallel_config.worker_cls = WORKER
            config.scheduler_config.scheduler_cls = SCHEDULER


def _adapt(config: Any, pruning: PruningConfig) -> None:
    """Turn off defaults of vLLM with which pruning would not be exact, and log that."""
    log, scheduler = compat.init_logger("vllm.fastav"), config.scheduler_config  # vLLM shows its own loggers only
    log.info("fastav: pruning %s by the plan %s", pruning.adapter.name, pruning.plan.name or pruning.plan.fingerprint)
    if scheduler.enable_chunked_prefill and (reason := guards.needs_whole_prompts(pruning)):
        log.warning("fastav: turned off chunked prefill: %s", reason)
        scheduler.enable_chunked_prefill = False
    chunks = scheduler.enable_chunked_prefill
    if config.cache_config.enable_prefix_caching and (reason := needs_no_prefixes(pruning, chunks)):
        log.warning("fastav: turned off prefix caching: %s", reason)
        config.cache_config.enable_prefix_caching = False
    if scheduler.long_prefill_token_threshold:
        log.warning("fastav: turned off long_prefill_token_threshold, as the last chunk of a prompt needs its room")
        scheduler.long_prefill_token_threshold = 0
    if not scheduler.enable_chunked_prefill:
        _make_room(scheduler, config.model_config.max_model_len)
    if not compat.current_platform.is_cpu():
        log.warning("fastav: pruning inside vLLM is tested on its CPU backend only, not on this device")
    mode = config.compilation_config.cudagraph_mode
    if mode is None or mode.has_full_cudagraphs():
        # graphs of the whole model would replay with the token counts of their capture; these leave attention out
        modes = compat.CUDAGraphMode
        graphs = modes.FULL_AND_PIECEWISE if compat.has_decode_graphs(config) else modes.PIECEWISE
        config.compilation_config.cudagraph_mode = graphs


def _make_room(scheduler: Any, max_model_len: int) -> None:
    """Make the longest prompt fit into one step, and the media of two steps into the encoder cache.

    If the encoder cache had no room for a prompt's media, vLLM would run the text before them alone.
    """
    scheduler.long_prefill_token_threshold = 0
    scheduler.max_num_scheduled_tokens = None  # vLLM then takes it from the next
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, max_model_len)
    scheduler.max_num_encoder_input_tokens = scheduler.max_num_batched_tokens
    scheduler.encoder_cache_size = 2 * scheduler.max_num_batched_tokens


def _serving(config: Any) -> Serving:
    """The settings of a `VllmConfig` that pruning depends on."""
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    media, compilation = model.multimodal_config, config.compilation_config
    lora = config.lora_config
    graphs, splits = compilation.cudagraph_mode, compilation.splitting_ops
    transfers = (config.kv_transfer_config, config.ec_transfer_config, cache.kv_offloading_size)
    return Serving(
        chunked_prefill=bool(config.scheduler_config.enable_chunked_prefill),
        speculative=config.speculative_config is not None,
        pipeline_parallel=parallel.pipeline_parallel_size,
        data_parallel=parallel.data_parallel_size,
        context_parallel=max(parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size),
        expert_parallel=bool(parallel.enable_expert_parallel),
        microbatches=bool(parallel.enable_dbo or parallel.ubatch_size),
        lora_experts=lora is not None and bool(model.get_num_experts()),
        lora_ranks=lora is not None and parallel.tensor_parallel_size > 1,
        lora_towers=lora is not None and bool(lora.enable_tower_connector_lora),
        kv_transfer=any(setting is not None for setting in transfers),
        pooling=model.runner_type != "generate",
        prompt_embeds=bool(model.enable_prompt_embeds),
        evs=media is not None and bool(media.video_pruning_rate),
        routed_experts=bool(config.aux_output_config.enabled),
        shared_media=media is not None and media.mm_processor_cache_type == "shm",
        own_worker=parallel.worker_cls not in ("auto", WORKER),
        own_scheduler=config.scheduler_config.scheduler_cls not in (None, SCHEDULER),
        whole_graphs=graphs is not None
        and graphs.name != "NONE"
        and (
            (graphs.has_full_cudagraphs() and not _has_decode_graphs_only(config))
            or compat.is_breakable_cudagraph_enabled()
            or (splits is not None and not compat.ATTENTION_OPS.issubset(splits))
        ),
    )


def _has_decode_graphs_only(config: Any) -> bool:
    """Whether graphs of the whole model are of decoding steps, with which fastav was tested."""
    mode = config.compilation_config.cudagraph_mode
    return compat.has_decode_graphs(config) and mode.mixed_mode() != compat.CUDAGraphMode.FULL
