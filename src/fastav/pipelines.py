"""The one-liner: a named model, a plan, and a question about a clip."""

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from os import PathLike
from typing import Any, overload

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from fastav.adapter import ModelAdapter, Request, Use, adapter_for, is_list, plan_named, request_of, requests_of
from fastav.batches import outcomes
from fastav.engine import GREEDY, Answer, Engine, Sampling
from fastav.errors import CheckpointError, FastAVError, reason_of
from fastav.media import Clip
from fastav.plan import Plan
from fastav.registry import ENGINES, MODELS
from fastav.sources import find_source, model_name

ClipLike = Clip | str | PathLike[str]  # a clip, as a pipeline takes it


class Pipeline:
    """A loaded model and the plan it runs by.  Made by `fastav.pipeline`.

    It may be called from several threads: the engine transformers answers them one after another. A call from within
    `on_text` of the same pipeline is an error. As a context it closes its engine in the end, for one that holds
    processes of its own.
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
        clip: ClipLike | Request,
        question: str | None = ...,
        *,
        use: Use | str = ...,
        plan: Plan | str | None = ...,
        max_new_tokens: int = ...,
        sampling: Sampling = ...,
        on_text: Callable[[str], None] | None = ...,
        batch: int = ...,
    ) -> Answer: ...

    @overload
    def __call__(
        self,
        clip: list[ClipLike] | tuple[ClipLike, ...] | list[Request] | tuple[Request, ...],
        question: str | list[str] | tuple[str, ...] | None = ...,
        *,
        use: Use | str = ...,
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
        plan: Plan | str | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        on_text: Callable[[str], None] | None = None,
        batch: int = 8,
    ) -> Answer | list[Answer]:
        """Answer a question about a clip, or a list of them.

        clip, question: a clip (a `Clip`, or a path) and a question, or a `Request` alone, for one answer. A list of
        requests, or a list of clips, of questions or of both in pairs, is answered in batches, by a list of answers in
        the same order; `map` gives those that come before an error, and the answers as they come.
        use: which tracks to show, `auto` being those that are there; a `Request` has its own. plan: another than the
        pipeline's, for this call.
        sampling: how tokens are chosen, by default the likeliest.
        on_text: called with each piece of the answer as it comes; for one request only.
        batch: how many of a list are answered together.
        Raises: MediaError, PlanError, UnsupportedPlan, FastAVError for lists that do not fit each other; the first
        error of a list.
        """
        if is_list(clip) or is_list(question):
            if on_text is not None:
                raise FastAVError("on_text shows one answer as it comes, and this is a list", "ask one by one")
            requests = requests_of(clip, question, Use(use))
            options = {"batch": batch, "plan": plan, "max_new_tokens": max_new_tokens, "sampling": sampling}
            return _in_order(self.map(requests, **options), len(requests))
        request = request_of(clip, question, Use(use))
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
        """Answer a set of requests in batches; results come in any order, each with its request's place in the set.

        A request that cannot be answered has its error as its result, and the others are answered all the same. Media
        of the next batch are decoded in a thread, which also reads `requests`, no further ahead than it must.
        requests: of any number; an error stands for one that could not be made, and comes back in its place.
        batch: how many are answered together. Within 8 batches they are put together by what they show of their clips,
        for how long, and the length of their questions.
        plan, max_new_tokens, sampling: as for one request; draws depend on what else is in a batch.

        Raises, at once: PlanError, UnsupportedPlan, FastAVError for a batch of none.
        """
        if batch < 1:
            raise FastAVError(f"batch must be at least 1, got {batch}")
        resolved = self.plan if plan is None else plan_named(plan, self.adapter)
        prepare = self.engine.preparer(resolved, max_new_tokens=max_new_tokens, sampling=sampling)
        return outcomes(requests, prepare, batch)


def _in_order(outcomes: Generator[tuple[int, Answer | FastAVError], None, None], number: int) -> list[Answer]:
    """All answers of a set, in its order.  Raises: the first error."""
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
    """Load a model and get it ready to answer.

    model: a name (`fastav models`), a local folder, or a hub id. `tiny` comes with the package, needs no network, and
    knows nothing but a toy world.
    plan: a `Plan`, the name of a preset of the model, a path to a plan's JSON, or a recipe (`fastv`, `fastv@0.25`).
    device: default `cuda` where there is one, else `cpu`. dtype: a name or torch's own, or `auto` for the checkpoint's;
    default `bfloat16` on a GPU, `float32` on a CPU.
    engine: `transformers`, or `vllm`, which answers sets of questions quickest (docs/vllm.md).
    attention: as transformers' `attn_implementation`; the engine vllm chooses its own.

    Raises, before weights load: UnknownName, PlanError, UnsupportedModel, UnsupportedPlan, and FastAVError for a device
    or dtype that cannot be used; CheckpointError.
    """
    model = model_name(model)
    adapter, source, config = resolve(model)
    resolved = plan_named(plan, adapter)
    engine_class: type[Engine] = ENGINES[engine]
    engine_class.check(config, resolved, attention)
    dtype_name = None if dtype is None else str(dtype).removeprefix("torch.")
    loaded_engine = engine_class.load(adapter, source, resolved, device=device, dtype=dtype_name, attention=attention)
    return Pipeline(loaded_engine, resolved, adapter)


def resolve(model: str) -> tuple[ModelAdapter, str, PreTrainedConfig]:
    """Adapter, source of weights and configuration of a model named as `pipeline` takes it.

    Raises: UnknownName for a word that is neither a name nor a folder, UnsupportedModel if no adapter knows it,
    CheckpointError if there is no such folder or hub id, or the hub cannot be reached.
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
        raise CheckpointError(f"no model at {model!r}: there is no config.json that names an architecture")
    adapter = adapter_for(data["architectures"], data)
    try:
        config = adapter.config(source)
        adapter.shape(config)
        return adapter, source, config
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(f"the configuration of {model!r} makes no sense: {reason_of(error)}") from None
