"""Pipelines: a loaded model and a plan that answer questions about clips."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from os import PathLike
from typing import Any, overload

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from fastav.adapter import ModelAdapter, adapter_for, plan_named
from fastav.batches import outcomes
from fastav.engine import GREEDY, Answer, Engine, Sampling
from fastav.errors import CheckpointError, FastAVError, reason_of
from fastav.media import Clip
from fastav.media._pyav import require_pyav
from fastav.messages import Message
from fastav.plan import Plan
from fastav.registry import ENGINES, MODELS
from fastav.request import Request, Use, is_list, request_of, requests_of
from fastav.sources import find_source, model_name

Messages = Sequence[Mapping[str, Any] | Message]
ClipLike = Clip | str | PathLike[str]  # a clip, or where to find it


class Pipeline:
    """A loaded model with a plan.  Made by `fastav.pipeline`.

    You can call it from several threads; the engine transformers answers them one after another. A call from inside
    `on_text` of the same pipeline is an error. As a context manager it closes its engine, which matters for engines
    with processes of their own.
    """

    def __init__(self, engine: Engine, plan: Plan, adapter: ModelAdapter) -> None:
        self.engine, self.plan, self.adapter = engine, plan, adapter

    def __repr__(self) -> str:
        engine = f"{type(self.engine).__name__} on {self.engine.device} in {self.engine.dtype}"
        return f"Pipeline({self.adapter.name!r}, plan={self.plan.name or self.plan.fingerprint!r}: {engine})"

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    @overload
    def __call__(
        self,
        clip: ClipLike | Request | Messages,
        question: str | None = ...,
        *,
        use: Use | str = ...,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        plan: Plan | str | None = ...,
        max_new_tokens: int = ...,
        sampling: Sampling = ...,
        on_text: Callable[[str], None] | None = ...,
        batch: int = ...,
    ) -> Answer: ...

    @overload
    def __call__(
        self,
        clip: list[ClipLike] | tuple[ClipLike, ...] | list[Request] | tuple[Request, ...] | list[Messages],
        question: str | list[str] | tuple[str, ...] | None = ...,
        *,
        use: Use | str = ...,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        plan: Plan | str | None = ...,
        max_new_tokens: int = ...,
        sampling: Sampling = ...,
        on_text: None = ...,
        batch: int = ...,
    ) -> list[Answer]: ...

    @overload
    def __call__(
        self,
        clip: ClipLike,
        question: list[str] | tuple[str, ...],
        *,
        use: Use | str = ...,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        plan: Plan | str | None = ...,
        max_new_tokens: int = ...,
        sampling: Sampling = ...,
        on_text: None = ...,
        batch: int = ...,
    ) -> list[Answer]: ...

    def __call__(
        self,
        clip: Any,
        question: Any = None,
        *,
        use: Use | str = Use.AUTO,
        tools: Sequence[Mapping[str, Any]] | None = None,
        plan: Plan | str | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        on_text: Callable[[str], None] | None = None,
        batch: int = 8,
    ) -> Answer | list[Answer]:
        """Answer a question about a clip, a conversation, or a list of these.

        clip, question: for one answer, a clip (a `Clip` or a path) and a question; or chat messages in transformers'
        format, with any number of clips, sounds and images, as far as the model takes them (docs/messages.md); or a
        `Request`. For a list of answers, a list of requests or of conversations; or a list of clips, a list of
        questions, or two lists that are paired. Lists run in batches. `map` yields answers early, and keeps those
        before an error.
        use: the tracks to show; `auto` is all that the clip has. A `Request` has its own. plan: replaces the pipeline's
        plan for this call.
        tools: descriptions of tools, for messages to a model whose chat template takes them.
        sampling: by default, greedy decoding.
        on_text: called with each new piece of the answer; for one request only.
        batch: how many requests of a list run together.
        Raises: MediaError, PlanError, UnsupportedPlan, FastAVError for lists that do not fit each other; the first
        error of a list.
        """
        if is_list(clip) or is_list(question):
            if on_text is not None:
                raise FastAVError(
                    "on_text works for one answer, and this is a list", "call the pipeline once per question"
                )
            requests = requests_of(clip, question, Use(use), tools)
            options = {"batch": batch, "plan": plan, "max_new_tokens": max_new_tokens, "sampling": sampling}
            return _in_order(self.map(requests, **options), len(requests))
        request = request_of(clip, question, Use(use), tools)
        resolved = self.plan if plan is None else plan_named(plan, self.adapter)
        options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "on_text": on_text}
        return self.engine.generate([request], resolved, **options)[0]

    def map(
        self,
        requests: Iterable[Request | FastAVError],
        *,
        batch: int = 8,
        plan: Plan | str | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
    ) -> Generator[tuple[int, Answer | FastAVError], None, None]:
        """Answer a set of requests in batches; results come in any order, each with the index of its request.

        A request that fails has its error as its result, and the others are still answered. A thread reads `requests`
        and decodes the media of the next batch, no further ahead than it must. requests: any number; an error stands
        for a request that could not be made, and comes back as its result. batch: how many requests run together.
        Within a window of 8 batches, requests are grouped by their tracks, the length of these, and the length of the
        question. plan, max_new_tokens, sampling: as for one request; sampled tokens depend on the other requests of a
        batch.

        Raises, at once: PlanError, UnsupportedPlan, FastAVError for a batch size below 1.
        """
        if batch < 1:
            raise FastAVError(f"batch must be at least 1, got {batch}")
        resolved = self.plan if plan is None else plan_named(plan, self.adapter)
        prepare = self.engine.preparer(resolved, max_new_tokens=max_new_tokens, sampling=sampling)
        return outcomes(requests, prepare, batch)


def _in_order(outcomes: Generator[tuple[int, Answer | FastAVError], None, None], number: int) -> list[Answer]:
    """The answers of a set, in the order of its requests.  Raises: the first error."""
    answers: dict[int, Answer] = {}
    with closing(outcomes):
        for index, outcome in outcomes:
            if isinstance(outcome, FastAVError):
                raise outcome
            answers[index] = outcome
    return [answers[index] for index in range(number)]


def pipeline(
    model: str | PathLike[str] = "tiny",
    plan: Plan | str = "fastav",
    *,
    engine: str = "transformers",
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str | None = None,
) -> Pipeline:
    """Load a model, ready to answer.

    model: a name (`fastav models`), a local folder, or a hub id. `tiny` comes with the package, needs no network, and
    knows only a toy world.
    plan: a `Plan`, the name of one of the model's presets, the path of a plan's JSON file, or a recipe (`fastv`,
    `fastv@0.25`).
    device: default `cuda` if available, else `cpu`. dtype: a name, a torch dtype, or `auto` for the checkpoint's;
    default `bfloat16` on a GPU, `float32` on a CPU.
    engine: `transformers`, or `vllm`, which is fastest for sets of questions (docs/vllm.md).
    attention: transformers' `attn_implementation`; the engine vllm chooses its own.

    Raises, before weights load: UnknownName, PlanError, UnsupportedModel, UnsupportedPlan, and FastAVError for a device
    or dtype that cannot be used; CheckpointError; InstallationError.
    """
    require_pyav()
    model = model_name(model)
    adapter, source, config = resolve(model)
    resolved = plan_named(plan, adapter)
    engine_class: type[Engine] = ENGINES[engine]
    engine_class.check(config, resolved, attention, adapter=adapter)
    dtype_name = None if dtype is None else str(dtype).removeprefix("torch.")
    loaded_engine = engine_class.load(adapter, source, resolved, device=device, dtype=dtype_name, attention=attention)
    return Pipeline(loaded_engine, resolved, adapter)


def resolve(model: str) -> tuple[ModelAdapter, str, PreTrainedConfig]:
    """The adapter, weight source and configuration of a model, named as for `pipeline`.

    Raises: UnknownName for a word that is neither a name nor a folder, UnsupportedModel if no adapter supports it,
    CheckpointError if the folder or hub id does not exist, or if the hub cannot be reached.
    """
    if model in MODELS:
        adapter: ModelAdapter = MODELS[model]()
        return adapter, adapter.checkpoint, adapter.config()
    source = find_source(model)
    try:
        data, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no model at {model!r}: {reason_of(error)}", f"give one of {', '.join(MODELS)}; a folder; or a hub id"
        ) from None
    if not data.get("architectures"):
        raise CheckpointError(f"no model at {model!r}: it has no config.json with an architecture")
    adapter = adapter_for(data["architectures"], data)
    try:
        config = adapter.config(source)
        adapter.shape(config)
        return adapter, source, config
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(f"the configuration of {model!r} is invalid: {reason_of(error)}") from None
