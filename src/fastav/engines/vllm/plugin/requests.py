"""Requests on their way into the engine: the plan that they name, what their layouts are read from, and refusals."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastav.adapter import ModelAdapter
from fastav.engines.vllm import compat, guards
from fastav.engines.vllm.plugin.request_state import Chunking, PlanCache
from fastav.errors import FastAVError, reason_of


def plan_cache(config: Any) -> PlanCache:
    """The plans of a server that prunes.

    config: vLLM's.
    Raises: PlanError, UnknownName, UnsupportedModel.
    """
    pruning = guards.read(config.additional_config, config.model_config.hf_config)
    assert pruning is not None, "vLLM runs our classes only where a plan is configured"
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


def check_inputs(process_inputs: Any) -> Any:
    """Wrap vLLM's `process_inputs` with our checks, whose errors it returns to the client like its own."""

    def wrapper(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        plans = _plan_cache_of(self)
        if wrong := guards.misspelled_key(getattr(params, "extra_args", None) or {}):
            raise _validation_error(f'a request names its plan as "fastav", not as "{wrong}"')
        if plans is None:
            if plan_override(params) is not None:
                raise _validation_error(f"this server does not prune: {guards.HINT}")
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        if getattr(params, "prompt_logprobs", None) is not None:
            raise _validation_error("prompt_logprobs needs logits of tokens that fastav drops: leave it out")
        if kwargs.get("resumable"):
            raise _validation_error("streamed input extends a prompt that has been pruned: send the whole prompt")
        with _as_validation_error():
            runtime = plans.get(plan_override(params))
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        if plans.chunking is not None and runtime.needs_whole_prompts and request.mm_features:
            if (length := len(request.prompt_token_ids)) > (budget := plans.chunking.token_budget):
                raise _validation_error(
                    f"{guards.needs_whole_prompts(runtime.pruning)}; this prompt has {length} tokens, and a step {budget}: "
                    "name another plan, or start the server with --no-enable-chunked-prefill"
                )
        if all(feature.data is not None for feature in request.mm_features or ()):  # unless vLLM's cache has it
            with _as_validation_error():
                runtime.count(layout_inputs(runtime.pruning.adapter, request))
        return request

    return wrapper


def refuse_beam_search(resolve_watermarking: Any) -> Any:
    """Wrap the first method of vLLM's input processor that sees the parameters of beam search."""

    def wrapper(self: Any, params: Any) -> Any:
        if type(params).__name__ == "BeamSearchParams" and _plan_cache_of(self) is not None:
            raise _validation_error(
                "vLLM's beam search sends a new prompt for every token, which would be pruned by other queries"
            )
        return resolve_watermarking(self, params)

    return wrapper


def _plan_cache_of(processor: Any) -> PlanCache | None:
    """The plans of the server that an input processor belongs to; None if it does not prune."""
    if "_fastav" not in processor.__dict__:
        config = processor.vllm_config
        prunes = isinstance(config.additional_config, Mapping) and "fastav" in config.additional_config
        processor.__dict__["_fastav"] = plan_cache(config) if prunes else None
    return processor.__dict__["_fastav"]


@contextmanager
def _as_validation_error() -> Iterator[None]:
    """Turn any error about a request's plan or prompt into one of that request, not of the engine."""
    try:
        yield
    except Exception as error:
        raise _validation_error(str(error) if isinstance(error, FastAVError) else reason_of(error)) from error


def _validation_error(message: str) -> Exception:
    """An error that vLLM's server answers with status 400."""
    return compat.VLLMValidationError(message)
