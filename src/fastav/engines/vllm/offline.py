"""vLLM in this process's service: started with a plan, given prompts, run until all have their answers.

What vLLM documents for that is used here, and nothing else of it: `LLM`, its renderer and engine, `SamplingParams`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from threading import Lock
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, ProcessorMixin

from fastav.adapter import Prompt
from fastav.engine import Sampling
from fastav.engines.vllm import guards
from fastav.engines.vllm.passage import inputs_of
from fastav.errors import EngineStopped, FastAVError, InstallationError, install_hint, reason_of
from fastav.plan import Plan
from fastav.request_lock import RequestLock

COOLEST, HOTTEST = 0.01, 2.0  # temperatures that vLLM takes as they are, besides 0
PER_PROMPT = {"video": 1, "audio": 1, "image": 0}  # a request is about one clip


class Said:
    """What vLLM has said to one request so far.

    tokens: generated, with the end marker. metrics: when what happened, if vLLM tells.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.metrics: Any = None

    def hear(self, output: Any) -> Sequence[int]:
        """Take in a piece, and give its tokens."""
        (piece,) = output.outputs
        self.tokens += piece.token_ids
        self.metrics = output.metrics
        return piece.token_ids


class Offline:
    """One `LLM`, which prunes.  Threads may share it: they take turns.

    asked: the plan that it runs by, where a request names no other.
    Raises: FastAVError if it was started without fastav.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        config = llm.llm_engine.vllm_config
        asked = guards.read(config.additional_config, config.model_config.hf_config)
        if asked is None or not _prunes(config):
            raise FastAVError(
                "this LLM was started without fastav",
                'LLM(..., additional_config={"fastav": {"plan": "fastav"}}); VLLM_PLUGINS must not leave fastav out',
            )
        self.asked = asked
        self._generation = _generation(config.model_config, asked.config)
        self._numbers = count()
        self._rendering, self._answering = Lock(), RequestLock()

    @property
    def processor(self) -> ProcessorMixin:
        """The family's, as vLLM has loaded it."""
        return self.llm.renderer.get_mm_processor().info.get_hf_processor()

    @property
    def dtype(self) -> str:
        """What the weights are."""
        return str(self.llm.model_config.dtype).removeprefix("torch.")

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the cache."""
        return self.llm.model_config.dtype.itemsize

    @property
    def longest(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self.llm.model_config.max_model_len

    def inputs(self, ready: Any) -> Mapping[str, Any]:
        """What an adapter reads the layout of a rendered prompt off."""
        media = [item for items in ready["mm_kwargs"].values() for item in items]
        return inputs_of(self.asked.adapter, ready["prompt_token_ids"], media)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer, by the model's own settings."""
        end = self._generation.eos_token_id
        return tuple(end) if isinstance(end, list) else () if end is None else (end,)

    def params(self, sampling: Sampling, new: int, plan: Plan, *, piecewise: bool = False) -> Any:
        """How the tokens of an answer are chosen, as vLLM wants it said.

        piecewise: whether pieces of the answer are wanted as they come.
        Raises: FastAVError for a temperature that vLLM would change or refuse.
        """
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        from vllm import SamplingParams  # pyright: ignore

        if sampling.temperature and not COOLEST <= sampling.temperature <= HOTTEST:
            raise FastAVError(
                f"vLLM draws at temperatures from {COOLEST} to {HOTTEST:g}, got {sampling.temperature}",
                "0 draws nothing",
            )
        penalty = sampling.repetition_penalty or self._generation.repetition_penalty or 1.0
        return SamplingParams(
            temperature=float(sampling.temperature),
            top_p=float(sampling.top_p),
            top_k=sampling.top_k or 0,
            min_p=float(self._generation.min_p or 0.0),
            repetition_penalty=float(penalty),
            seed=sampling.seed,
            stop=list(sampling.stop),
            stop_token_ids=list(self.ends),
            ignore_eos=True,  # the tokenizer's; those of the model's settings are named above
            max_tokens=new,
            output_kind=RequestOutputKind.DELTA if piecewise else RequestOutputKind.FINAL_ONLY,
            extra_args=None if plan.steps == self.asked.plan.steps else {"fastav": plan.to_json()},
        )

    def rendered(self, prompt: Prompt) -> Any:
        """A prompt, tokenized and with its media as the processor leaves them: what `answered` is given.

        Raises: FastAVError if it cannot be.
        """
        from vllm.exceptions import VLLMClientError  # pyright: ignore[reportMissingImports]

        given = {
            "prompt": prompt.text,
            "multi_modal_data": dict(prompt.media),
            "mm_processor_kwargs": dict(prompt.options),
        }
        try:
            with self._rendering:
                # the cache of processed media would leave out what it has seen, which layouts are read off
                (ready,) = self.llm.renderer.render_cmpl([given], skip_mm_cache=True)
        except (ValueError, VLLMClientError) as error:
            if isinstance(error.__cause__, FastAVError):  # of a processor of ours, in there
                raise error.__cause__ from None
            raise FastAVError(f"vLLM cannot take this prompt: {reason_of(error)}") from error
        return ready

    def answered(
        self, prompts: Sequence[Any], params: Any, on_tokens: Callable[[Sequence[int]], None] | None = None
    ) -> tuple[Said, ...]:
        """Answers to prompts that are asked at once.

        on_tokens: called with each piece of an answer as it comes, if `params` want pieces.
        Raises: FastAVError if vLLM refuses a request, EngineStopped if it has ended.
        """
        with self._answering:
            return self._answered(prompts, params, on_tokens)

    def _answered(
        self, prompts: Sequence[Any], params: Any, on_tokens: Callable[[Sequence[int]], None] | None
    ) -> tuple[Said, ...]:
        from vllm.v1.engine.exceptions import EngineDeadError  # pyright: ignore[reportMissingImports]

        engine, said = self.llm.llm_engine, {str(next(self._numbers)): Said() for _ in prompts}
        try:
            for name, prompt in zip(said, prompts, strict=True):
                self._ask(name, prompt, params)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    tokens = said[output.request_id].hear(output)
                    if on_tokens is not None:
                        on_tokens(tokens)
        except EngineDeadError as error:
            raise EngineStopped("vLLM has ended in the middle of its work", "its log above says why") from error
        finally:
            with suppress(EngineDeadError):
                engine.abort_request(list(said))  # those that have ended are not known any more
        return tuple(said.values())

    def _ask(self, name: str, prompt: Any, params: Any) -> None:
        from vllm.exceptions import VLLMClientError  # pyright: ignore[reportMissingImports]

        try:
            self.llm.llm_engine.add_request(name, prompt, params)
        except (ValueError, VLLMClientError) as error:
            raise FastAVError(f"vLLM does not take a request: {reason_of(error)}") from error

    def close(self) -> None:
        """End vLLM's processes and give back what they hold."""
        from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]

        self.llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def start(source: str, plan: Plan, dtype: str | None = None) -> Any:
    """An `LLM` that prunes.

    dtype: of the weights (None: `bfloat16`, on a CPU `float32`).
    Raises: FastAVError if vLLM is not installed, is another one, or does not start.
    """
    LLM = imported().LLM  # noqa: N806
    from fastav.engines.vllm import internals

    internals.require_version()
    internals.install()
    try:
        return LLM(
            source,
            dtype=dtype or ("float32" if platform() == "cpu" else "bfloat16"),
            max_model_len=-1,  # as long as there is memory for
            limit_mm_per_prompt=PER_PROMPT,
            disable_log_stats=False,  # without them it does not tell when a request ran
            additional_config={"fastav": {"plan": json.loads(plan.to_json())}},
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise FastAVError(f"vLLM does not start: {reason_of(error)}", "its log says more") from error


def imported() -> Any:
    """vLLM.  Raises: FastAVError if it is not installed."""
    try:
        import vllm  # pyright: ignore[reportMissingImports]

        _ = vllm.LLM  # pyright: ignore[reportAttributeAccessIssue]
    except (ImportError, AttributeError) as error:
        raise InstallationError(f"the engine vllm needs vLLM: {reason_of(error)}", install_hint("vllm")) from None
    return vllm


def platform() -> str:
    """What vLLM runs on: `cpu`, `cuda`, ..."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    return current_platform.device_type


def _prunes(config: Any) -> bool:
    from fastav.engines.vllm import internals

    return config.parallel_config.worker_cls == internals.WORKER


def _generation(model: Any, config: PreTrainedConfig) -> GenerationConfig:
    """The settings that come with a model, as transformers reads them."""
    try:
        return GenerationConfig.from_pretrained(model.model, revision=model.revision)
    except OSError:
        return GenerationConfig.from_model_config(config)
