"""vLLM's offline engine in this process: started with a plan, given prompts, run until all have their answers.

It uses what vLLM documents: `LLM` with its renderer and engine, and `SamplingParams`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from threading import Lock
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, ProcessorMixin

from fastav.adapter import VllmInputs
from fastav.engines.vllm import compat, guards
from fastav.engines.vllm.plugin import register
from fastav.engines.vllm.plugin.requests import allow_any_plan, prompt_inputs
from fastav.errors import EngineStopped, FastAVError, reason_of
from fastav.plan import Plan
from fastav.request_lock import Cancellation, RequestLock

OWN_ARGUMENTS = ("model", "limit_mm_per_prompt", "disable_log_stats", "additional_config", "worker_cls")  # of `LLM`
MEDIA_LIMITS = {"video": 1, "audio": 1, "image": 0}  # per prompt: a request is about one clip


class Generation:
    """The answer of vLLM to one request so far.

    tokens: generated, with the end token. metrics: times of the request, if vLLM records them.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.metrics: Any = None

    def append(self, output: Any) -> Sequence[int]:
        """Add a piece of vLLM's output, and return its tokens."""
        (piece,) = output.outputs
        self.tokens += piece.token_ids
        self.metrics = output.metrics
        return piece.token_ids


class Offline:
    """One `LLM` that prunes.  Threads may share it: they take turns.

    pruning: the plan that it runs by, where a request has none of its own. generation_config: the model's.
    Raises: FastAVError if it was started without fastav.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        config = llm.llm_engine.vllm_config
        pruning = guards.read(config.additional_config, config.model_config.hf_config)
        if pruning is None or config.parallel_config.worker_cls != register.WORKER:
            raise FastAVError(
                "this LLM was started without fastav",
                'LLM(..., additional_config={"fastav": {"plan": "fastav"}}); VLLM_PLUGINS must not leave fastav out',
            )
        self.pruning = pruning
        allow_any_plan(llm.llm_engine.input_processor)
        self.generation_config = _generation_config(config.model_config, pruning.config)
        self._request_ids = count()
        self._render_lock, self._engine_lock = Lock(), RequestLock()

    @property
    def processor(self) -> ProcessorMixin:
        """The family's processor, as vLLM has loaded it."""
        return self.llm.renderer.get_mm_processor().info.get_hf_processor()

    @property
    def dtype(self) -> str:
        """The dtype of the weights."""
        return str(self.llm.model_config.dtype).removeprefix("torch.")

    @property
    def itemsize(self) -> int:
        """Bytes per number in the cache."""
        return self.llm.model_config.dtype.itemsize

    @property
    def max_model_len(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self.llm.model_config.max_model_len

    def layout_inputs(self, rendered: Any) -> Mapping[str, Any]:
        """The inputs that an adapter reads the layout of a rendered prompt from."""
        media = [item for items in rendered["mm_kwargs"].values() for item in items]
        return prompt_inputs(self.pruning.adapter, rendered["prompt_token_ids"], media)

    def params(self, arguments: Mapping[str, Any], max_tokens: int, plan: Plan, *, stream: bool = False) -> Any:
        """vLLM's `SamplingParams`.

        arguments: as `sampling_arguments` gives them. stream: whether the answer is to come in pieces.
        """
        kind = compat.RequestOutputKind
        return compat.SamplingParams(
            **arguments,
            max_tokens=max_tokens,
            output_kind=kind.DELTA if stream else kind.FINAL_ONLY,
            extra_args=None if plan.steps == self.pruning.plan.steps else {"fastav": plan.to_json()},
        )

    def render(self, inputs: VllmInputs) -> Any:
        """A prompt for `generate`: its token ids, and its media as the processor leaves them.

        Raises: FastAVError if vLLM cannot take it.
        """
        prompt = {
            "prompt": inputs.text,
            "multi_modal_data": dict(inputs.media),
            "mm_processor_kwargs": dict(inputs.options),
        }
        try:
            with self._render_lock:
                # the cache of processed media would withhold known features, which layouts are read from
                (rendered,) = self.llm.renderer.render_cmpl([prompt], skip_mm_cache=True)
        except (ValueError, compat.VLLMClientError) as error:
            if isinstance(error.__cause__, FastAVError):  # of a processor of ours, inside vLLM's
                raise error.__cause__ from None
            several = any(isinstance(media, list) for media in inputs.media.values()) or "image" in inputs.media
            hint = "for several clips, or images, make the engine yourself with limit_mm_per_prompt (docs/vllm.md)"
            raise FastAVError(f"vLLM cannot take this prompt: {reason_of(error)}", hint if several else "") from error
        return rendered

    def generate(
        self,
        prompts: Sequence[Any],
        params: Sequence[Any],
        on_tokens: Callable[[Sequence[int]], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> tuple[Generation, ...]:
        """The answers to prompts that run at the same time.

        params: of each prompt. on_tokens: called with each piece of an answer as it comes, if `params` want pieces.
        cancellation: is checked before the turn of these prompts.
        Raises: FastAVError if vLLM refuses a request, EngineStopped if it has ended; Cancelled.
        """
        with self._engine_lock.turn(cancellation):
            return self._run(prompts, params, on_tokens)

    def _run(
        self, prompts: Sequence[Any], params: Sequence[Any], on_tokens: Callable[[Sequence[int]], None] | None
    ) -> tuple[Generation, ...]:
        engine = self.llm.llm_engine
        generations = {str(next(self._request_ids)): Generation() for _ in prompts}
        try:
            for request_id, prompt, own in zip(generations, prompts, params, strict=True):
                self._add_request(request_id, prompt, own)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    tokens = generations[output.request_id].append(output)
                    if on_tokens is not None:
                        on_tokens(tokens)
        except compat.EngineDeadError as error:
            raise EngineStopped("vLLM stopped before it had answered", "its log above says why") from error
        finally:
            with suppress(compat.EngineDeadError):
                engine.abort_request(list(generations))  # vLLM ignores those that are complete
        return tuple(generations.values())

    def _add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        try:
            self.llm.llm_engine.add_request(request_id, prompt, params)
        except (ValueError, compat.VLLMClientError) as error:
            raise FastAVError(f"vLLM does not take a request: {reason_of(error)}") from error

    def close(self) -> None:
        """End vLLM's processes and free what they hold."""
        self.llm.llm_engine.engine_core.shutdown()
        compat.cleanup_dist_env_and_memory()


def start(source: str, plan: Plan, dtype: str | None = None, model_kwargs: Mapping[str, Any] | None = None) -> Any:
    """An `LLM` that prunes.

    dtype: of the weights (None: `bfloat16`, on a CPU `float32`). model_kwargs: more arguments of `vllm.LLM`.
    Raises: FastAVError if vLLM is not installed, is an untested version, or does not start; for arguments that are
    fastav's to set.
    """
    if own := [name for name in model_kwargs or () if name in OWN_ARGUMENTS]:
        raise FastAVError(f"fastav sets {own[0]} of vllm.LLM itself", f"leave model_kwargs[{own[0]!r}] out")
    compat.require_vllm()
    compat.require_version()
    register.install()
    try:
        return compat.LLM(
            source,
            **{"max_model_len": -1, **(model_kwargs or {})},  # by default as long as there is memory for
            dtype=dtype or ("float32" if compat.device_type() == "cpu" else "bfloat16"),
            limit_mm_per_prompt=MEDIA_LIMITS,
            disable_log_stats=False,  # which record the times of requests
            additional_config={"fastav": {"plan": json.loads(plan.to_json())}},
        )
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise FastAVError(f"vLLM does not start: {reason_of(error)}", "its log says more") from error


def _generation_config(model: Any, config: PreTrainedConfig) -> GenerationConfig:
    """The generation config that comes with a model, as transformers reads it."""
    try:
        return GenerationConfig.from_pretrained(model.model, revision=model.revision)
    except OSError:
        return GenerationConfig.from_model_config(config)
