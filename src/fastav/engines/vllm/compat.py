"""The one file that imports vLLM: where each vLLM name that fastav uses is defined, by vLLM version.

Other modules take these names from here. A name is imported when it is first read, so that a process loads no part of
vLLM that it does not need, and this module itself can be imported without vLLM. To support another version, add its
table to `INTERNALS`; `tests/vllm/test_vllm_compat.py` says which names have moved. A patch release is another version.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from fastav.errors import FastAVError, InstallationError, install_hint, reason_of

_V0_32 = {
    # documented: the offline engine, plugins, models from other packages
    "LLM": "vllm",
    "SamplingParams": "vllm",
    "RequestOutputKind": "vllm.sampling_params",
    "VLLMClientError": "vllm.exceptions",
    "VLLMValidationError": "vllm.exceptions",
    "AdapterLogitsProcessor": "vllm.v1.sample.logits_processor",
    "LogitsProcessor": "vllm.v1.worker.gpu.sample.logits_processor",
    "MULTIMODAL_REGISTRY": "vllm.multimodal",
    "MultiModalDataParser": "vllm.multimodal.parse",
    "MultiModalFieldConfig": "vllm.multimodal.inputs",
    "ProcessorBatchItems": "vllm.multimodal.parse",
    "BaseDummyInputsBuilder": "vllm.multimodal.processing",
    "BaseMultiModalProcessor": "vllm.multimodal.processing",
    "BaseProcessingInfo": "vllm.multimodal.processing",
    "ProcessorInputs": "vllm.multimodal.processing",
    "PromptReplacement": "vllm.multimodal.processing",
    "PromptUpdateDetails": "vllm.multimodal.processing",
    "ModelRegistry": "vllm.model_executor.models",
    "SupportsMultiModal": "vllm.model_executor.models.interfaces",
    "init_vllm_registered_model": "vllm.model_executor.models.utils",
    "maybe_prefix": "vllm.model_executor.models.utils",
    # internal: configuration and processes
    "CUDAGraphMode": "vllm.config",
    "VllmConfig": "vllm.config",
    "MODELS_CONFIG_MAP": "vllm.model_executor.models.config",
    "current_platform": "vllm.platforms",
    "is_breakable_cudagraph_enabled": "vllm.compilation.breakable_cudagraph",
    "init_logger": "vllm.logger",
    "cleanup_dist_env_and_memory": "vllm.distributed",
    "get_tp_group": "vllm.distributed",
    # internal: from requests to token ids
    "EngineDeadError": "vllm.v1.engine.exceptions",
    "InputProcessor": "vllm.v1.engine.input_processor",
    "ExecutionContext": "vllm.v1.metrics.perf",
    "ModelMetrics": "vllm.v1.metrics.perf",
    "LoggingStatLogger": "vllm.v1.metrics.loggers",
    "MediaConnector": "vllm.multimodal.media",
    "MediaWithBytes": "vllm.multimodal.media",
    "VIDEO_LOADER_REGISTRY": "vllm.multimodal.video",
    "HfRenderer": "vllm.renderers.hf",
    "RENDERER_REGISTRY": "vllm.renderers.registry",
    "TokenizerRegistry": "vllm.tokenizers.registry",
    "parse_chat_messages": "vllm.renderers.chat_utils",
    "parse_chat_messages_async": "vllm.renderers.chat_utils",
    "safe_apply_chat_template": "vllm.renderers.hf",
    # internal: the scheduler and the KV cache
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler",
    "Scheduler": "vllm.v1.core.sched.scheduler",
    "FullAttentionManager": "vllm.v1.core.single_type_kv_cache_manager",
    "FullAttentionSpec": "vllm.v1.kv_cache_interface",
    "KVCacheSpec": "vllm.v1.kv_cache_interface",
    "KVCacheSpecRegistry": "vllm.v1.kv_cache_spec_registry",
    # internal: workers and attention
    "AttentionGroup": "vllm.v1.worker.utils",
    "CPUWorker": "vllm.v1.worker.cpu_worker",
    "Worker": "vllm.v1.worker.gpu_worker",
    "AttentionLayerBase": "vllm.model_executor.layers.attention_layer_base",
    "LoRAMapping": "vllm.lora.layers",
    "CommonAttentionMetadata": "vllm.v1.attention.backend",
    "DefaultModelState": "vllm.v1.worker.gpu.model_states.default",
    "get_forward_context": "vllm.forward_context",
    "override_forward_context": "vllm.forward_context",
}
_V0_33 = {**_V0_32}  # none has moved
INTERNALS: Mapping[str, Mapping[str, str]] = {  # by tested version: the module of each name
    "0.32.0": _V0_32,
    "0.33.0": _V0_33,
}
VERSIONS = tuple(INTERNALS)
INSTALLED = VERSIONS[0]  # the version of the extra `vllm`, for which there is a build for CPUs

DECODERS = frozenset(  # module and class of the decoders whose layers can be pruned
    {
        "qwen2.Qwen2Model",
        "qwen3_vl.Qwen3LLMModel",
        "qwen3_vl_moe.Qwen3MoeLLMModel",
        "qwen3_omni_moe_thinker.Qwen3MoeLLMModel",
    }
)
ATTENTION_BACKENDS = ("CPU_ATTN", "FLASH_ATTN")  # others may own much memory in every metadata builder
DECODE_GRAPHS: frozenset[str] = frozenset()  # versions whose CUDA graphs of whole decoding steps a GPU test has run
ATTENTION_OPS = frozenset({"vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"})
HF_TOKENIZER = ("vllm.tokenizers.hf", "CachedHfTokenizer")


def __getattr__(name: str) -> Any:
    if name in _V0_32:
        return globals().setdefault(name, _imported(name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _imported(name: str) -> Any:
    """Import a name; of an untested vLLM, from where the newest tested one has it.  Raises: ImportError."""
    module = import_module(INTERNALS.get(version(), INTERNALS[VERSIONS[-1]])[name])
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise ImportError(str(error)) from error


def version() -> str:
    """The installed version of vLLM, without the device that it was built for.  Raises: ImportError."""
    return _full_version().partition("+")[0]


def _full_version() -> str:
    if (number := getattr(import_module("vllm"), "__version__", None)) is None:
        raise ImportError("the module vllm is not vLLM")
    return number


def is_supported() -> bool:
    """Whether fastav was tested with the internals of this vLLM, on whichever device."""
    return version() in VERSIONS


def require_version() -> None:
    """Refuse a vLLM whose internals fastav was not tested with.  Raises: FastAVError."""
    if not is_supported():
        raise FastAVError(
            f"fastav prunes inside vLLM {' or '.join(VERSIONS)}, this is {_full_version()}",
            f"pip install vllm=={INSTALLED}",
        )


def require_vllm() -> None:
    """Raises: InstallationError if vLLM is not installed."""
    try:
        _imported("LLM")
    except ImportError as error:
        raise InstallationError(f"the engine vllm needs vLLM: {reason_of(error)}", install_hint("vllm")) from None


def device_type() -> str:
    """The kind of device that vLLM runs on: `cpu`, `cuda`, ..."""
    return _imported("current_platform").device_type


def worker_class() -> Any:
    """vLLM's worker class for this platform."""
    return _imported("CPUWorker" if _imported("current_platform").is_cpu() else "Worker")


def has_decode_graphs(config: Any) -> bool:
    """Whether decoding steps may run as CUDA graphs of the whole model.  config: vLLM's."""
    return version() in DECODE_GRAPHS and config.use_v2_model_runner


def num_computed_tokens(scheduler_output: Any) -> dict[str, int]:
    """The tokens of each request that had run before a scheduled step, by request id."""
    cached = scheduler_output.scheduled_cached_reqs
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return computed | {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
