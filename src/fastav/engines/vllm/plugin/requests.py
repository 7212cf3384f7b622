"""Requests on their way into the engine: the plan that they name, what their layouts are read from, and refusals."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np

from fastav.adapter import ModelAdapter
from fastav.engines.vllm import compat, guards, models
from fastav.engines.vllm.plugin import errors
from fastav.engines.vllm.plugin.layout_features import LayoutFeatures
from fastav.engines.vllm.plugin.metrics import PruningMetrics, log_periodically
from fastav.engines.vllm.plugin.request_state import Chunking, PlanCache
from fastav.engines.vllm.plugin.usage import UsageCounter, collect
from fastav.engines.vllm.request_plans import RequestPlans, request_plans
from fastav.errors import FastAVError, PlanError, reason_of


def require_plugin() -> None:
    """Refuse a vLLM that runs our classes without our plugin, which checks configurations and requests.

    Raises: FastAVError.
    """
    if not hasattr(compat.VllmConfig, "_fastav"):
        raise FastAVError(
            "vLLM has not loaded the plugin fastav, so it would not prune",
            "VLLM_PLUGINS must be unset or name fastav; and fastav must be installed where vLLM is",
        )


def plan_cache(config: Any) -> PlanCache:
    """The plans of a server that prunes.

    config: vLLM's.
    Raises: PlanError, UnknownName, UnsupportedModel; FastAVError if vLLM has not loaded the plugin.
    """
    require_plugin()
    pruning = guards.read(config.additional_config, config.model_config.hf_config)
    if pruning is None:
        raise PlanError("vLLM is to run fastav's classes, but no plan is configured", guards.HINT)
    scheduler = config.scheduler_config
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    # before layer 0 there is nothing to reuse but embeddings
    reused_layer = pruning.compiled.first_layer or None if config.cache_config.enable_prefix_caching else None
    return PlanCache(pruning, Chunking.of(budget, reused_layer) if scheduler.enable_chunked_prefill else None)


def plan_override(params: Any) -> Any:
    """The plan in a request's sampling parameters (`vllm_xargs` of the OpenAI server); None if there is none."""
    return (getattr(params, "extra_args", None) or {}).get("fastav")


def layout_inputs(adapter: ModelAdapter, request: Any) -> dict[str, Any]:
    """The inputs that an adapter reads a request's layout from."""
    features = sorted(request.mm_features or (), key=lambda feature: feature.mm_position.offset)
    assert all(feature.data is not None for feature in features), "a cache that withholds features is refused at start"
    return prompt_inputs(adapter, request.prompt_token_ids, [feature.data for feature in features])


def prompt_inputs(adapter: ModelAdapter, ids: Sequence[int], media: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The inputs that an adapter reads a prompt's layout from: its ids, and the media features that layouts need.

    media: the features of each medium from vLLM's processor, in the order of the prompt.
    """
    inputs: dict[str, Any] = {"input_ids": np.asarray(ids)[None]}
    for name, join in guards.MODELS[adapter.name].items():
        if arrays := [item[name].data.numpy() for item in media if name in item]:
            inputs[name] = join(arrays)
    return inputs


class Admission:
    """The requests of one process on their way into the engine of a server that prunes.

    config: vLLM's. mm_cache: its cache of processed media; None if it is off.
    """

    def __init__(self, config: Any, mm_cache: Any) -> None:
        self.plans, self._mm_cache = plan_cache(config), mm_cache
        self.allowed: RequestPlans = request_plans(guards.pruning_entry(config.additional_config))
        pruning, model = self.plans.default.pruning, config.model_config
        self.metrics = PruningMetrics(_served_name(model), pruning.plan.name or pruning.plan.fingerprint)
        log_periodically(self.metrics)
        cache_dtype = config.cache_config.cache_dtype
        itemsize = 1 if str(cache_dtype).startswith(("fp8", "int8")) else model.dtype.itemsize
        self._counter = UsageCounter(self.plans.default, model.max_model_len, itemsize, config.cache_config)
        self._features = LayoutFeatures(guards.MODELS[pruning.adapter.name], mm_cache)

    @contextmanager
    def refusing(self, reason: str) -> Iterator[None]:
        """Turn any error about a request into one of that request, not of the engine, and count it.

        reason: that it is counted under.
        """
        try:
            with _as_validation_error():
                yield
        except compat.VLLMValidationError:
            self.metrics.refuse(reason)
            raise

    @contextmanager
    def _forgetting(self, features: Sequence[Any]) -> Iterator[None]:
        """Forget the media of a refused request: vLLM takes them for sent, and the engine has not got them.

        features: vLLM's, of the request.
        """
        try:
            yield
        except Exception:
            for feature in features:
                if self._mm_cache is not None and feature.mm_hash is not None:
                    self._mm_cache.invalidate(feature.mm_hash)
            raise

    def admit(self, request: Any, plan_spec: str | None) -> None:
        """Count a request by its layout.  Raises: VLLMValidationError if it cannot be pruned."""
        with self.refusing("prompt"), self._forgetting(list(request.mm_features or ())):
            runtime = self.plans.get(plan_spec)
            if (media := self._features.of(list(request.mm_features or ()))) is None:
                return  # which the engine refuses, as it lacks a medium
            adapter = runtime.pruning.adapter
            layout, kv_lens = runtime.count(prompt_inputs(adapter, request.prompt_token_ids, media))
            runtime.require_room(len(layout), kv_lens)
            usage = self._counter.usage(runtime, layout, kv_lens)
        label = "json" if plan_spec is not None and plan_spec.lstrip().startswith("{") else usage.plan
        self.metrics.admit(usage, label, getattr(request.sampling_params, "n", None) or 1)
        collect(usage)


def _served_name(model: Any) -> str:
    name = model.served_model_name
    return name[0] if isinstance(name, list) else name or model.model


def open_admission(init: Any) -> Any:
    """Wrap the construction of vLLM's input processor, so that a server that prunes has its counters from the start."""

    @wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if admission_of(self) is not None or set(self.model_config.architectures or ()) & set(models.ARCHITECTURES):
            errors.explain_fetching()

    return wrapper


def check_inputs(process_inputs: Any) -> Any:
    """Wrap vLLM's `process_inputs` with our checks, whose errors it returns to the client like its own."""

    def wrapper(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        def process() -> Any:
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)

        if (admission := admission_of(self)) is None:
            with _as_validation_error():
                _require_known_keys(params)
                if plan_override(params) is not None:
                    raise PlanError("this server does not prune", guards.HINT)
                errors.check_grammar(params, self.tokenizer)
            return process()
        with admission.refusing("setting"):
            _require_known_keys(params)
            errors.check_grammar(params, self.tokenizer)
            if getattr(params, "prompt_logprobs", None) is not None:
                raise PlanError("prompt_logprobs needs logits of tokens that fastav drops: leave it out")
            if kwargs.get("resumable"):
                raise PlanError("streamed input extends a prompt that has been pruned: send the whole prompt")
        with admission.refusing("plan"):
            plan_spec = plan_override(params)
            admission.allowed.check(plan_spec)
            admission.plans.get(plan_spec)
        request = process()
        admission.admit(request, plan_spec)
        return request

    return wrapper


def refuse_beam_search(resolve_watermarking: Any) -> Any:
    """Wrap the first method of vLLM's input processor that sees the parameters of beam search."""

    def wrapper(self: Any, params: Any) -> Any:
        if type(params).__name__ == "BeamSearchParams" and (admission := admission_of(self)) is not None:
            with admission.refusing("setting"):
                raise PlanError(
                    "vLLM's beam search sends a new prompt for every token, which would be pruned by other queries"
                )
        return resolve_watermarking(self, params)

    return wrapper


def admission_of(processor: Any) -> Admission | None:
    """The admission of the server that an input processor belongs to; None if it does not prune."""
    if "_fastav" not in processor.__dict__:
        config = processor.vllm_config
        prunes = isinstance(config.additional_config, Mapping) and "fastav" in config.additional_config
        admission = Admission(config, processor.renderer.mm_processor_cache) if prunes else None
        processor.__dict__["_fastav"] = admission
    return processor.__dict__["_fastav"]


def allow_any_plan(processor: Any) -> None:
    """Let the requests of this process name any plan, as they are its owner's."""
    if (admission := admission_of(processor)) is not None:
        admission.allowed = RequestPlans(takes_json=True)


def _require_known_keys(params: Any) -> None:
    """Raises: PlanError for a key that a client has misspelled."""
    if wrong := guards.misspelled_key(getattr(params, "extra_args", None) or {}):
        raise PlanError(f'a request names its plan as "fastav", not as "{wrong}"')


@contextmanager
def _as_validation_error() -> Iterator[None]:
    """Turn any error about a request into one of that request, which vLLM's server answers with status 400."""
    try:
        yield
    except Exception as error:
        message = str(error) if isinstance(error, FastAVError) else reason_of(error)
        raise compat.VLLMValidationError(message) from error
