"""What cannot be exact inside vLLM is refused when it starts, in words."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from fastav.adapter import ModelAdapter, adapter_for, plan_named
from fastav.errors import PlanError, UnsupportedModel, UnsupportedPlan
from fastav.method import Signal
from fastav.plan import Plan
from fastav.pruning import decoder_layers
from fastav.pruning.compiled import CompiledPlan, compile_plan

Features = Mapping[str, Callable[..., Any]]  # what of the media's features layouts read: how several become one array
GRIDS: Features = {"video_grid_thw": np.stack}
CLIPS: Features = {"feature_attention_mask": np.concatenate}
MODELS: Mapping[str, Features] = {
    "qwen2-5-omni": GRIDS,
    "qwen2-5-vl": GRIDS,
    "qwen3-omni": GRIDS,
    "qwen3-vl": GRIDS,
    "tiny": CLIPS,
    "tiny-long": CLIPS,
    "video-salmonn2": CLIPS | {"audio_index": np.concatenate},
    "videollama2": CLIPS,
}
HOW = 'start it with --additional-config \'{"fastav": {"plan": "fastav"}}\''
LONGEST, STEPS, LARGEST = 16_384, 32, 1024  # of a plan that comes with a request, for which others wait
PROVIDES = frozenset(Signal) - {Signal.GIVEN, Signal.ENCODER, Signal.SECONDS}  # what vLLM passes on


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `additional_config` asks for: a plan, for a model.

    config: as the adapter reads it, a thinker's of a model that also speaks. text: the decoder's.
    """

    plan: Plan
    adapter: ModelAdapter
    config: PreTrainedConfig

    @property
    def text(self) -> PreTrainedConfig:
        """The decoder's configuration."""
        return self.config.get_text_config(decoder=True)

    @property
    def depth(self) -> int:
        """How many layers the decoder has."""
        text: Any = self.text
        return text.num_hidden_layers

    @cached_property
    def compiled(self) -> CompiledPlan:
        """The plan, compiled for the model.  Raises: PlanError, UnsupportedModel, UnsupportedPlan."""
        return compile_plan(self.plan, self.text, self.adapter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What a vLLM server is about to do, as far as pruning cares.  Of each, what is the default does no harm."""

    prefix_caching: bool = False
    chunked_prefill: bool = False
    speculative: bool = False
    pipeline_parallel: int = 1
    data_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: bool = False
    microbatches: bool = False
    lora: bool = False
    kv_transfer: bool = False
    pooling: bool = False
    prompt_embeds: bool = False
    evs: bool = False
    routed_experts: bool = False
    shared_media: bool = False
    own_worker: bool = False
    own_scheduler: bool = False
    v2_runner: bool = False
    whole_graphs: bool = False


_REFUSED = {  # a field of Serving: why, and what to do
    "prefix_caching": (
        "prefix caching takes blocks of the cache for the tokens that their hash names, and pruned layers keep others",
        "--no-enable-prefix-caching",
    ),
    "speculative": ("speculative decoding puts draft tokens where the last query is looked for", "leave it out"),
    "microbatches": ("microbatches (DBO) run halves of a batch that are not followed", "leave it out"),
    "expert_parallel": (
        "expert parallelism, which gives whole experts to ranks, is not shown to be exact while pruning",
        "leave --enable-expert-parallel out: tensor parallelism divides every expert",
    ),
    "lora": ("LoRA maps the tokens of a whole batch to adapters, and pruned layers run on fewer", "merge the adapter"),
    "kv_transfer": (
        "KV connectors and offloading move blocks by the tokens that an unpruned layer would hold",
        "leave them out",
    ),
    "pooling": ("pooling reads hidden states of tokens that are dropped", "serve a model that generates"),
    "prompt_embeds": ("prompts given as embeddings do not tell audio from text", "--no-enable-prompt-embeds"),
    "evs": ("vLLM's own video pruning leaves fewer tokens than the layout counts", "leave --video-pruning-rate out"),
    "routed_experts": ("experts are returned by place, and pruned layers run on fewer", "leave it out"),
    "shared_media": (
        "with its media cache in shared memory, vLLM's scheduler does not know what a prompt is made of",
        "--mm-processor-cache-type lru",
    ),
    "own_worker": ("another worker class is asked for, and pruning needs its own", "leave --worker-cls out"),
    "own_scheduler": (
        "another scheduler class is asked for, and pruning needs its own to count what a cache holds",
        "leave --scheduler-cls out",
    ),
    "v2_runner": (
        "vLLM's model runner V2 is not supported yet (it is vLLM's choice on a GPU)",
        "VLLM_USE_V2_MODEL_RUNNER=0, which has not been run on a GPU",
    ),
    "whole_graphs": (
        "CUDA graphs with attention or its cache in them replay without looking at what was kept",
        "VLLM_USE_BREAKABLE_CUDAGRAPH=0, and leave cudagraph_mode and splitting_ops to vLLM",
    ),
}
ELSE = "divide the model by tensor parallelism, or start a server for each copy of it"
_ALONE = {  # fields that count: what they are called
    "pipeline_parallel": "pipeline parallelism",
    "data_parallel": "data parallelism",
    "context_parallel": "context parallelism",
}


def read(additional: Any, whole: PreTrainedConfig) -> Asked | None:
    """What `additional_config` asks for; None if it says nothing of fastav.

    whole: the model's configuration. `plan` is a preset of the model, a recipe, a file's name, or a plan's JSON object.
    Raises: PlanError, UnknownName, UnsupportedModel.
    """
    if (said := asked_for(additional)) is None:
        return None
    if not isinstance(said, Mapping) or set(said) != {"plan"}:
        raise PlanError(
            f'additional_config\'s "fastav" must be an object with a "plan", got {json.dumps(said)}',
            '{"fastav": {"plan": "fastav"}}',
        )
    adapter = adapter_for(whole.architectures or (), whole.to_dict())
    plan = said["plan"]
    if isinstance(plan, Mapping):
        plan = Plan.from_json(json.dumps(plan))
    elif isinstance(plan, str):
        plan = plan_named(plan, adapter)
    else:
        raise PlanError(f"a plan must be a name or a JSON object, got {json.dumps(plan)}")
    return Asked(plan=plan, adapter=adapter, config=getattr(whole, "thinker_config", whole))


def asked_for(additional: Any) -> Any:
    """What `additional_config` holds of ours, not yet looked at; None if nothing.  Raises: PlanError."""
    if not isinstance(additional, Mapping):
        return None
    if wrong := misspelt(additional):
        raise PlanError(f"additional_config names {wrong}, of which nothing is read", 'write it "fastav"')
    if "fastav" not in additional:
        return None
    if additional["fastav"] is None:
        raise PlanError('additional_config\'s "fastav" holds no plan', '{"fastav": {"plan": "fastav"}}')
    return additional["fastav"]


def misspelt(names: Iterable[Any]) -> str | None:
    """The name that means fastav and does not say it, if there is one."""
    for name in names:
        if name != "fastav" and "".join(filter(str.isalnum, str(name))).lower() == "fastav":
            return str(name)
    return None


def named(asked: Asked, said: str, chunked_prefill: bool) -> Asked:
    """What is asked for by a request that names another plan than the server's.

    said: a preset of the model, a recipe, or a plan's JSON; no file's name, as files are the server's.
    Raises: PlanError, UnknownName, UnsupportedPlan.
    """
    if len(said) > LONGEST:
        raise PlanError(f"a request's plan may have {LONGEST:,} letters, got {len(said):,}")
    if said.lstrip().startswith("{"):
        plan = Plan.from_json(said)
        if len(plan.steps) > STEPS or _largest(plan) > LARGEST:
            raise PlanError(f"a request's plan may have {STEPS} steps, and options up to {LARGEST:,}")
    elif said.endswith(".json"):
        raise PlanError("a request cannot name a file of the server's", "send the plan's JSON itself")
    else:
        plan = plan_named(said, asked.adapter)
    found = replace(asked, plan=plan)
    check_plan(found)
    _check_pieces(found, chunked_prefill)
    return found


def _largest(plan: Plan) -> float | int:
    """The largest number among the options of a plan's methods."""
    numbers = [value for step in plan.steps for value in step.options.values() if isinstance(value, float | int)]
    return max(numbers, default=0)


def check_plan(asked: Asked) -> None:
    """Refuse plans that cannot be carried out exactly inside vLLM.

    Raises: PlanError, UnsupportedModel, UnsupportedPlan.
    """
    text: Any = asked.text
    if asked.adapter.name not in MODELS:
        raise UnsupportedModel(
            f"{asked.adapter.name} cannot be pruned inside vLLM yet", f"models that can: {', '.join(MODELS)}"
        )
    asked.plan.require(asked.adapter.name, asked.depth, text.hidden_size)
    if asked.plan.cache_cuts(asked.depth):
        raise UnsupportedPlan("vLLM's cache cannot give back tokens of one layer alone", "leave cache_only out")
    if missing := asked.compiled.needs - PROVIDES:
        method = next(method for method in asked.compiled.methods if method.needs & missing)
        raise UnsupportedPlan(
            f"{type(method).__name__} reads {', '.join(sorted(method.needs & missing))}, which vLLM does not pass on",
            "choose another method, or the engine transformers",
        )
    if any(decoder_layers.narrow(asked.text)[asked.compiled.first_layer :]):
        raise UnsupportedPlan(
            "vLLM counts a sliding window in stored keys, which are not neighbours after pruning",
            "prune after the last sliding-window layer",
        )


def check(asked: Asked, serving: Serving) -> None:
    """Refuse what cannot be exact, or is not shown to be.  Raises: PlanError, UnsupportedModel, UnsupportedPlan."""
    check_plan(asked)
    for name, (reason, hint) in _REFUSED.items():
        if getattr(serving, name):
            raise UnsupportedPlan(f"{reason}", hint)
    for name, called in _ALONE.items():
        if (number := getattr(serving, name)) > 1:
            raise UnsupportedPlan(f"{called} of {number} is not shown to be exact while pruning", ELSE)
    _check_pieces(asked, serving.chunked_prefill)


def _check_pieces(asked: Asked, chunked_prefill: bool) -> None:
    if chunked_prefill and not asked.compiled.layout_only:
        scoring = next(type(method).__name__ for method in asked.compiled.methods if not method.layout_only)
        raise UnsupportedPlan(
            f"{scoring} looks at whole prompts, and chunked prefill shows it pieces", "--no-enable-chunked-prefill"
        )
