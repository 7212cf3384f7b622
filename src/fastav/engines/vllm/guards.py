"""Checks when vLLM starts: plans and settings with which pruning would not be exact are refused."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from fastav.adapter import ModelAdapter, adapter_for, plan_named
from fastav.client_plans import client_plan
from fastav.engines.vllm.request_plans import request_plans
from fastav.errors import PlanError, UnsupportedModel, UnsupportedPlan
from fastav.method import ENCODER_SIGNALS, OWN_SIGNALS, Signal
from fastav.plan import Plan
from fastav.pruning import decoder_layers
from fastav.pruning.compiled import CompiledPlan, compile_plan


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one array, with zeros at their ends."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), rows[0].dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


Features = Mapping[str, Callable[..., Any]]  # what of the media's features layouts read: how several become one array
GRIDS: Features = {"video_grid_thw": np.stack, "image_grid_thw": np.stack}
OMNI: Features = GRIDS | {"feature_attention_mask": _padded}  # which tells sounds apart
CLIPS: Features = {"feature_attention_mask": np.concatenate}
MODELS: Mapping[str, Features] = {
    "qwen2-5-omni": OMNI,
    "qwen2-5-vl": GRIDS,
    "qwen3-omni": OMNI,
    "qwen3-vl": GRIDS,
    "tiny": CLIPS,
    "tiny-long": CLIPS,
    "video-salmonn2": CLIPS | {"audio_index": np.concatenate},
    "videollama2": CLIPS,
}
WORKER = "fastav.engines.vllm.plugin.worker.PruningWorker"
SCHEDULER = "fastav.engines.vllm.plugin.scheduler.create_scheduler"
MIDDLEWARE = "fastav.engines.vllm.plugin.middleware.UsageMiddleware"
HINT = 'start it with --additional-config \'{"fastav": {"plan": "fastav"}}\''
# signals that exist inside vLLM
PROVIDES = frozenset(Signal) - OWN_SIGNALS - ENCODER_SIGNALS - {Signal.GIVEN, Signal.SECONDS}


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """The plan that `additional_config` names, and the model that it is for.

    config: as the adapter reads it; of a model that also speaks, its thinker's.
    """

    plan: Plan
    adapter: ModelAdapter
    config: PreTrainedConfig

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", self.plan.for_decoder(self.adapter.shape(self.config)))

    @property
    def text(self) -> PreTrainedConfig:
        """The decoder's configuration."""
        return self.config.get_text_config(decoder=True)

    @property
    def depth(self) -> int:
        """The number of decoder layers."""
        text: Any = self.text
        return text.num_hidden_layers

    @cached_property
    def compiled(self) -> CompiledPlan:
        """The plan, compiled for the model.  Raises: PlanError, UnsupportedModel, UnsupportedPlan."""
        return compile_plan(self.plan, self.text, self.adapter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """The settings of a vLLM server that pruning depends on.  Every default is compatible with pruning."""

    chunked_prefill: bool = False
    speculative: bool = False
    pipeline_parallel: int = 1
    data_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: bool = False
    microbatches: bool = False
    lora_experts: bool = False
    lora_ranks: bool = False
    lora_towers: bool = False
    kv_transfer: bool = False
    pooling: bool = False
    prompt_embeds: bool = False
    evs: bool = False
    routed_experts: bool = False
    shared_media: bool = False
    own_worker: bool = False
    own_scheduler: bool = False
    whole_graphs: bool = False


_REFUSED = {  # a field of Serving: the reason, and what to do
    "speculative": ("speculative decoding puts draft tokens where methods expect the last query", "leave it out"),
    "microbatches": ("microbatches (DBO) split a batch in a way that the plugin does not follow", "leave it out"),
    "expert_parallel": (
        "expert parallelism, which gives whole experts to ranks, is not shown to be exact while pruning",
        "leave --enable-expert-parallel out: tensor parallelism divides every expert",
    ),
    "lora_experts": (
        "LoRA of a mixture of experts is not shown to be exact while pruning",
        "merge the adapter into the weights",
    ),
    "lora_ranks": (
        "LoRA with tensor parallelism is not shown to be exact while pruning",
        "merge the adapter into the weights, or leave --tensor-parallel-size out",
    ),
    "lora_towers": (
        "LoRA of encoders is not shown to be exact while pruning",
        "leave enable_tower_connector_lora out: adapters of the decoder work",
    ),
    "kv_transfer": (
        "KV connectors and offloading move the blocks of an unpruned layer",
        "leave them out",
    ),
    "pooling": ("pooling reads the hidden states of dropped tokens", "serve a model that generates"),
    "prompt_embeds": (
        "a prompt given as embeddings does not show which tokens are audio or text",
        "--no-enable-prompt-embeds",
    ),
    "evs": (
        "vLLM's own video pruning leaves fewer tokens than the layout counts",
        "leave --video-pruning-rate out",
    ),
    "routed_experts": (
        "routed experts are returned by token position, but pruned layers run on fewer tokens",
        "leave it out",
    ),
    "shared_media": (
        "with the multimodal processor cache in shared memory, vLLM's scheduler cannot read the layout of a prompt",
        "--mm-processor-cache-type lru",
    ),
    "own_worker": ("pruning needs its own worker class, but another one is set", "leave --worker-cls out"),
    "own_scheduler": (
        "pruning needs its own scheduler class to count cached tokens, but another one is set",
        "leave --scheduler-cls out",
    ),
    "whole_graphs": (
        "CUDA graphs that contain attention or KV cache updates replay with the token counts of their capture",
        "VLLM_USE_BREAKABLE_CUDAGRAPH=0, and leave cudagraph_mode and splitting_ops to vLLM",
    ),
}
PARALLEL_HINT = "divide the model by tensor parallelism, or start a server for each copy of it"
_PARALLEL = {  # fields of Serving that must be 1, in words
    "pipeline_parallel": "pipeline parallelism",
    "data_parallel": "data parallelism",
    "context_parallel": "context parallelism",
}


def read(additional_config: Any, model_config: PreTrainedConfig) -> PruningConfig | None:
    """The pruning that `additional_config` configures; None if it has no entry for fastav.

    model_config: of the whole model. The entry's `plan` is a preset of the model, a recipe, a file's name, or a plan's
    JSON object; `requests` is as `request_plans` reads it.
    Raises: PlanError, UnknownName, UnsupportedModel.
    """
    if (entry := pruning_entry(additional_config)) is None:
        return None
    if not isinstance(entry, Mapping) or set(entry) - {"requests"} != {"plan"}:
        raise PlanError(
            f'additional_config\'s "fastav" must be an object with a "plan", got {json.dumps(entry)}',
            '{"fastav": {"plan": "fastav"}}; it may also have "requests"',
        )
    request_plans(entry)
    adapter = adapter_for(model_config.architectures or (), model_config.to_dict())
    plan_spec = entry["plan"]
    if isinstance(plan_spec, Mapping):
        plan = Plan.from_json(json.dumps(plan_spec))
    elif isinstance(plan_spec, str):
        plan = plan_named(plan_spec, adapter)
    else:
        raise PlanError(f"a plan must be a name or a JSON object, got {json.dumps(plan_spec)}")
    return PruningConfig(plan=plan, adapter=adapter, config=getattr(model_config, "thinker_config", model_config))


def pruning_entry(additional_config: Any) -> Any:
    """The entry `fastav` of `additional_config`, unchecked; None if there is none.  Raises: PlanError."""
    if not isinstance(additional_config, Mapping):
        return None
    if wrong := misspelled_key(additional_config):
        raise PlanError(f'additional_config has the key "{wrong}", which fastav does not read', 'write it "fastav"')
    if "fastav" not in additional_config:
        return None
    if additional_config["fastav"] is None:
        raise PlanError('additional_config\'s "fastav" has no plan', '{"fastav": {"plan": "fastav"}}')
    return additional_config["fastav"]


def misspelled_key(keys: Iterable[Any]) -> str | None:
    """The first key that differs from `fastav` only in case or punctuation; None if there is none."""
    for key in keys:
        if key != "fastav" and "".join(filter(str.isalnum, str(key))).lower() == "fastav":
            return str(key)
    return None


def with_plan(pruning: PruningConfig, plan_spec: str) -> PruningConfig:
    """The configuration for a request that overrides the server's plan.

    plan_spec: a preset of the model, a recipe, or a plan's JSON; not a file name, as files belong to the server.
    Raises: PlanError, UnknownName, UnsupportedPlan.
    """
    override = replace(pruning, plan=client_plan(plan_spec, pruning.adapter))
    check_plan(override)
    return override


def check_request_plans(pruning: PruningConfig, entry: Any) -> None:
    """Refuse a list of plans for requests that names one which requests could not choose.

    entry: for fastav in `additional_config`.
    Raises: PlanError, UnknownName, UnsupportedPlan.
    """
    for name in request_plans(entry).names or ():
        with_plan(pruning, name)


def check_plan(pruning: PruningConfig) -> None:
    """Refuse plans that cannot be carried out exactly inside vLLM.

    Raises: PlanError, UnsupportedModel, UnsupportedPlan.
    """
    if pruning.adapter.name not in MODELS:
        raise UnsupportedModel(
            f"{pruning.adapter.name} cannot be pruned inside vLLM yet", f"models that can: {', '.join(MODELS)}"
        )
    compiled = pruning.compiled
    if compiled.cache_cuts:
        raise UnsupportedPlan("vLLM cannot free the cached tokens of a single layer", "leave cache_only out")
    if compiled.earlier_caches_until:
        raise UnsupportedPlan("vLLM cannot free cached tokens of earlier layers", "leave earlier_caches out")
    if missing := compiled.needs - PROVIDES:
        method = next(method for method in compiled.methods if compiled.signals_of(method) & missing)
        signals = ", ".join(sorted(compiled.signals_of(method) & missing))
        raise UnsupportedPlan(
            f"method {compiled.name_of(method)!r} reads {signals}, which vLLM does not provide",
            "choose another method, or the engine transformers",
        )
    if any(decoder_layers.narrow(pruning.text)[compiled.first_layer :]):
        raise UnsupportedPlan(
            "vLLM counts a sliding window in stored keys, which are not contiguous after pruning",
            "prune after the last sliding-window layer",
        )


def check(pruning: PruningConfig, serving: Serving) -> None:
    """Refuse what cannot be exact, or is not shown to be.  Raises: PlanError, UnsupportedModel, UnsupportedPlan."""
    check_plan(pruning)
    for name, (reason, hint) in _REFUSED.items():
        if getattr(serving, name):
            raise UnsupportedPlan(f"{reason}", hint)
    for name, term in _PARALLEL.items():
        if (number := getattr(serving, name)) > 1:
            raise UnsupportedPlan(f"{term} of {number} is not shown to be exact while pruning", PARALLEL_HINT)
    if serving.chunked_prefill and (reason := needs_whole_prompts(pruning)):
        raise UnsupportedPlan(reason, "--no-enable-chunked-prefill")


def needs_whole_prompts(pruning: PruningConfig) -> str | None:
    """Why a prompt cannot come in chunks under a plan; None if it can.  Raises: PlanError, UnsupportedPlan."""
    compiled = pruning.compiled
    for method in compiled.methods:
        if Signal.ROLLOUT in method.needs:
            return (
                f"method {compiled.name_of(method)!r} reads the attention of all tokens in every layer before its cut, "
                "and a chunk of chunked prefill has only that of its own tokens"
            )
    return None if compiled.layout_only else needs_late_cuts(pruning, compiled.first_scored_layer)


def needs_late_cuts(pruning: PruningConfig, layer: int) -> str | None:
    """Why the states that enter a layer cannot be held; None if they can."""
    if layer < (layers := _deepstack_layers(pruning.config)):
        return (
            f"the states before layer {layer} cannot be held: this decoder adds visual features in its first {layers} "
            "layers, which later steps no longer have"
        )
    return None


def _deepstack_layers(config: Any) -> int:
    """The number of decoder layers after which visual features are added (deepstack)."""
    return len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ())
