"""Pipelines: a loaded model and a plan that answer questions about clips."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Any, overload

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, ProcessorMixin
from transformers.utils.hub import cached_file

from fastav.adapter import ModelAdapter, adapter_for, plan_named
from fastav.batches import outcomes
from fastav.chats import Chat
from fastav.decoding.settings import check_settings
from fastav.engine import Answer, Engine
from fastav.errors import CheckpointError, FastAVError, reason_of
from fastav.inspection import Inspection
from fastav.media import Clip
from fastav.media._pyav import require_pyav
from fastav.messages import Message
from fastav.models._checkpoint import HUB_OPTIONS
from fastav.plan import Plan
from fastav.registry import ENGINES, MODELS
from fastav.request import Request, Use, is_list, request_of, requests_of
from fastav.request_lock import Cancellation
from fastav.sources import find_source, model_name
from fastav.streams import Ask, AsyncTextStream, TextStream

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
        on_text: Callable[[str], None] | None = ...,
        batch: int = ...,
        **settings: Any,
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
        on_text: None = ...,
        batch: int = ...,
        **settings: Any,
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
        on_text: None = ...,
        batch: int = ...,
        **settings: Any,
    ) -> list[Answer]: ...

    def __call__(
        self,
        clip: Any,
        question: Any = None,
        *,
        use: Use | str = Use.AUTO,
        tools: Sequence[Mapping[str, Any]] | None = None,
        plan: Plan | str | None = None,
        on_text: Callable[[str], None] | None = None,
        batch: int = 8,
        **settings: Any,
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
        on_text: called with each new piece of the answer; for one request only.
        batch: how many requests of a list run together.
        settings: keyword arguments of transformers' `generate`: `max_new_tokens` (128 if neither you nor the model set
        a length), `do_sample`, `temperature`, `stop_strings`, `num_beams`, `generation_config`, ...; and `seed`, for
        sampling (without it, torch's generator in its current state). What you leave out is what the model's
        generation config says: a checkpoint that samples by default does so here (docs/decoding.md).
        Raises: MediaError, PlanError, UnsupportedPlan, FastAVError for lists that do not fit each other; the first
        error of a list.
        """
        settings = check_settings(settings)
        if is_list(clip) or is_list(question):
            if on_text is not None:
                raise FastAVError(
                    "on_text works for one answer, and this is a list", "call the pipeline once per question"
                )
            requests = requests_of(clip, question, Use(use), tools)
            return _in_order(self.map(requests, batch=batch, plan=plan, **settings), len(requests))
        request = request_of(clip, question, Use(use), tools)
        return self.engine.generate([request], self._plan(plan), on_text=on_text, **settings)[0]

    def map(
        self,
        requests: Iterable[Request | FastAVError],
        *,
        batch: int = 8,
        plan: Plan | str | None = None,
        **settings: Any,
    ) -> Generator[tuple[int, Answer | FastAVError], None, None]:
        """Answer a set of requests in batches; results come in any order, each with the index of its request.

        A request that fails has its error as its result, and the others are still answered. A thread reads `requests`
        and decodes the media of the next batch, no further ahead than it must. requests: any number; an error stands
        for a request that could not be made, and comes back as its result. batch: how many requests run together.
        Within a window of 8 batches, requests are grouped by their tracks, the length of these, and the length of the
        question. plan, settings: as for one request; sampled tokens depend on the other requests of a batch.

        Raises, at once: PlanError, UnsupportedPlan, FastAVError for a batch size below 1.
        """
        if batch < 1:
            raise FastAVError(f"batch must be at least 1, got {batch}")
        prepare = self.engine.preparer(self._plan(plan), **check_settings(settings))
        return outcomes(requests, prepare, batch)

    def stream(
        self,
        clip: ClipLike | Request | Messages,
        question: str | None = None,
        *,
        use: Use | str = Use.AUTO,
        tools: Sequence[Mapping[str, Any]] | None = None,
        plan: Plan | str | None = None,
        **settings: Any,
    ) -> TextStream:
        """The answer to one question, piece by piece: `for piece in pipe.stream(clip, question): ...`.

        Work starts when you iterate, in a thread of its own. When you leave the loop, it stops within one token. After
        the loop the stream's `answer` is the `Answer`. Arguments: as for a call; the clip is opened in the thread.
        Raises, at once: PlanError. In the loop: as a call.
        """
        return TextStream(self._asker(clip, question, use, tools, plan, settings))

    def astream(
        self,
        clip: ClipLike | Request | Messages,
        question: str | None = None,
        *,
        use: Use | str = Use.AUTO,
        tools: Sequence[Mapping[str, Any]] | None = None,
        plan: Plan | str | None = None,
        **settings: Any,
    ) -> AsyncTextStream:
        """`stream` for asyncio: `async for piece in pipe.astream(clip, question): ...`.

        The event loop goes on meanwhile. Cancelling the task stops the answer within one token.
        """
        return AsyncTextStream(self._asker(clip, question, use, tools, plan, settings))

    def chat(
        self,
        *,
        system: str | None = None,
        plan: Plan | str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        resume: str | PathLike[str] | None = None,
    ) -> Chat:
        """A conversation whose clips are prefilled once: `chat = pipe.chat()`, then `chat.ask(clip, question)`.

        system: the system message. plan: replaces the pipeline's plan. tools: for a chat template that takes them.
        resume: a file that `chat.save` wrote, to continue from.
        Raises: PlanError, UnsupportedPlan; UnsupportedModel with the engine vllm, which keeps no cache between
        requests; FastAVError for a file of another model, dtype or plan, and for `system` with `resume`.
        """
        if resume is not None and system is not None:
            raise FastAVError("a resumed chat has its own system message", "leave system out, or start a new chat")
        resolved = self._plan(plan)
        chat = Chat(self.engine.conversation(resolved), resolved, system=system, tools=tools)
        return chat if resume is None else chat.resume(resume)

    def inspect(
        self,
        clip: ClipLike | Request | Messages,
        question: str | None = None,
        *,
        use: Use | str = Use.AUTO,
        tools: Sequence[Mapping[str, Any]] | None = None,
        plan: Plan | str | None = None,
    ) -> Inspection:
        """Which tokens of one prompt every cut of the plan drops, and by which scores; no answer is generated.

        The kept tokens are those of an answer's prefill. Arguments: as for a call.
        Raises: UnsupportedPlan with the engine vllm, which does not expose its cuts; otherwise as a call.
        """
        if is_list(clip) or is_list(question):
            raise FastAVError("an inspection is of one prompt, and this is a list", "inspect each by itself")
        return self.engine.inspect(request_of(clip, question, Use(use), tools), self._plan(plan))

    def _asker(
        self, clip: Any, question: Any, use: Use | str, tools: Any, plan: Any, settings: Mapping[str, Any]
    ) -> Ask:
        """A function that answers one request for a stream."""
        if is_list(clip) or is_list(question):
            raise FastAVError("a stream is one answer, and this is a list", "make one stream per question")
        settings, resolved, use = check_settings(settings), self._plan(plan), Use(use)

        def ask(on_text: Callable[[str], None], cancellation: Cancellation) -> Answer:
            request = request_of(clip, question, use, tools)
            options = {"on_text": on_text, "cancellation": cancellation, **settings}
            return self.engine.generate([request], resolved, **options)[0]

        return ask

    def _plan(self, plan: Plan | str | None) -> Plan:
        return self.plan if plan is None else plan_named(plan, self.adapter)


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
    model: str | PathLike[str] | nn.Module = "tiny",
    plan: Plan | str = "fastav",
    *,
    processor: ProcessorMixin | None = None,
    engine: str = "transformers",
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Pipeline:
    """Load a model, or take a loaded one, ready to answer.

    model: a name (`fastav models`), a local folder, or a hub id. `tiny` comes with the package, needs no network, and
    knows only a toy world. Or a model of transformers that you have loaded, on any device, with any adapter of PEFT,
    quantized or not; of one that also speaks, the part that writes text answers. It stays where it is and as it is.
    plan: a `Plan`, the name of one of the model's presets, the path of a plan's JSON file, or a recipe (`fastv`,
    `fastv@0.25`).
    processor: of a loaded model; None to load the one of the folder, or of the hub's cache, that the model is from.
    device: default `cuda` if available, else `cpu`. dtype: a name, a torch dtype, or `auto` for the checkpoint's;
    default `bfloat16` on a GPU, `float32` on a CPU.
    engine: `transformers`, or `vllm`, which is fastest for sets of questions (docs/vllm.md).
    attention: transformers' `attn_implementation`; the engine vllm chooses its own.
    model_kwargs: more keyword arguments of `from_pretrained`: `device_map` (then without `device`),
    `quantization_config`, `revision`, `local_files_only`, ...; for the engine vllm, of `vllm.LLM`.

    Raises, before weights load: UnknownName, PlanError, UnsupportedModel, UnsupportedPlan, and FastAVError for a device
    or dtype that cannot be used, and for arguments that contradict each other; CheckpointError; InstallationError.
    """
    require_pyav()
    engine_class: type[Engine] = ENGINES[engine]
    if isinstance(model, nn.Module):
        options = {"device": device, "dtype": dtype, "attention": attention, "model_kwargs": model_kwargs}
        if passed := [name for name, value in options.items() if value is not None]:
            raise FastAVError(
                f"{passed[0]} cannot be set for a model that is loaded already",
                "leave it out, and load or move the model as you want it, e.g. model.to('cuda')",
            )
        return Pipeline(*engine_class.from_model(model, processor, plan))
    model = model_name(model)
    if processor is not None:
        raise FastAVError(
            f"processor goes with a loaded model, and {model!r} is loaded with its own", "leave processor out"
        )
    options = _load_options(device, dtype, attention, model_kwargs)
    hub = {name: value for name, value in options["model_kwargs"].items() if name in HUB_OPTIONS}
    adapter, source, config = resolve(model, **hub)
    resolved = plan_named(plan, adapter)
    engine_class.check(config, resolved, options["attention"], adapter=adapter)
    return Pipeline(engine_class.load(adapter, source, resolved, **options), resolved, adapter)


_OWN_ARGUMENTS = {"dtype": "dtype", "torch_dtype": "dtype", "attn_implementation": "attention"}
"""Keyword arguments of `from_pretrained` that `pipeline` has under a name of its own."""


def _load_options(
    device: str | None,
    dtype: str | torch.dtype | None,
    attention: str | None,
    model_kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The options of `Engine.load`.  Raises: FastAVError for arguments that contradict each other."""
    if not isinstance(model_kwargs, Mapping | None) or not all(isinstance(name, str) for name in model_kwargs or ()):
        raise FastAVError("model_kwargs must be a mapping from the names of arguments to their values")
    rest = dict(model_kwargs or {})
    options: dict[str, Any] = {"device": device, "dtype": dtype, "attention": attention}
    for name, own in _OWN_ARGUMENTS.items():
        if (value := rest.pop(name, None)) is not None:
            if options[own] is not None:
                raise FastAVError(f"{own} and model_kwargs[{name!r}] are the same setting", "pass one of them")
            options[own] = value
    if device is not None and rest.get("device_map") is not None:
        raise FastAVError(
            f"device={device!r} and model_kwargs['device_map'] both say where the model goes", "pass one of them"
        )
    if options["dtype"] is not None:
        options["dtype"] = str(options["dtype"]).removeprefix("torch.")
    return {**options, "model_kwargs": rest}


def resolve(model: str, **hub: Any) -> tuple[ModelAdapter, str, PreTrainedConfig]:
    """The adapter, weight source and configuration of a model, named as for `pipeline`.

    hub: arguments of `from_pretrained` that say where and how to look: `revision`, `token`, `local_files_only`, ...
    Raises: UnknownName for a word that is neither a name nor a folder, UnsupportedModel if no adapter supports it,
    CheckpointError if the folder or hub id does not exist, or if the hub cannot be reached.
    """
    if model in MODELS:
        adapter: ModelAdapter = MODELS[model]()
        return adapter, adapter.checkpoint, adapter.config()
    source = find_source(model, hub.get("revision"), local=bool(hub.get("local_files_only")))
    try:
        data, _ = PreTrainedConfig.get_config_dict(source, **hub)
        file = cached_file(source, "config.json", **hub) if hub else None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no model at {model!r}: {reason_of(error)}", f"give one of {', '.join(MODELS)}; a folder; or a hub id"
        ) from None
    if not data.get("architectures"):
        raise CheckpointError(f"no model at {model!r}: it has no config.json with an architecture")
    adapter = adapter_for(data["architectures"], data)
    try:
        config = adapter.config(source if file is None else str(Path(file).parent))
        adapter.shape(config)
        return adapter, source, config
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(f"the configuration of {model!r} is invalid: {reason_of(error)}") from None
