"""`fastav run`."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from fastav import __version__
from fastav.cli import _options, _plans, _render
from fastav.cli._output import print_json, require_folder, write_file
from fastav.cli._progress import progress, spinner, suppress_warnings
from fastav.cli._text import printable, stderr
from fastav.cli._types import Answer, Pipeline, Plan, Request
from fastav.errors import FastAVError, PlanError

REPEAT = 3
DEFAULT_MODEL = "tiny"  # the model that comes with the package


def run(
    clip: Annotated[
        str, typer.Argument(metavar="CLIP", help="A video or audio file, or a URL; or a file CHAT.json with messages.")
    ],
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="A question about the clip; none with CHAT.json.")
    ] = None,
    model: _options.Model = DEFAULT_MODEL,
    plan: _options.PlanName = "fastav",
    retention: _options.Retention = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run unpruned, and compare; PLAN can be a list A,B,...")
    ] = False,
    repeat: Annotated[
        int | None, typer.Option(min=1, metavar="N", help=f"Runs per plan with --compare.  [default: {REPEAT}]")
    ] = None,
    use: _options.Use = "auto",
    max_new_tokens: _options.MaxNewTokens = 128,
    temperature: _options.Temperature = 0.0,
    top_p: _options.TopP = 1.0,
    top_k: _options.TopK = None,
    repetition_penalty: _options.RepetitionPenalty = None,
    stop: _options.Stop = None,
    seed: _options.Seed = None,
    device: _options.Device = None,
    dtype: _options.DtypeOrAuto = None,
    engine: _options.Engine = "transformers",
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write a page that shows which tokens stay. Overwrites FILE.html."),
    ] = None,
    as_json: _options.Json = False,
) -> None:
    """Answer a question about a clip, or the last of the chat messages in a file CHAT.json.

    The answer goes to stdout, on a terminal while it is generated; its costs go to stderr. With --compare the model is
    loaded once and alternates between the unpruned model and each PLAN. Without --model, the embedded model answers,
    which knows only a toy world.

    --json prints one object with model, clip, question, device, dtype and versions, and with text, token_ids, finish,
    plan, prompt_tokens, tokens_per_layer, mean_retention, flops, kv_bytes, seconds, peak_bytes and dropped_ends. With
    --compare the latter are in plans, by plan.

    --report writes one self-contained HTML page with the answer and every token of the prompt: which part of which
    frame or second it is, and at which layer it was dropped; with --compare, those of all plans. It prefills the prompt
    once more for each plan.
    """
    if repeat is not None and not compare:
        raise PlanError("--repeat needs --compare", "give both or neither")
    request = _request_of(clip, question, use)
    settings = _options.generation_settings(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    names = [_plans.aimed(name, retention) for name in (plan.split(",") if compare else [plan])]
    if report is not None:
        _check_report(report, engine)
    pipe = load_pipeline(model, names, device, dtype, engine, compare=compare)
    ask = partial(pipe, request, **settings)
    result = {"model": model, "clip": clip, "question": request.question, **_run_info(pipe)}
    with pipe, suppress_warnings(), out_of_memory_as_error():
        plans = _compared(pipe, names) if compare else {"": pipe.plan}
        if compare:
            answers = _compare(plans, ask, repeat or REPEAT)
            result |= {"repeat": repeat or REPEAT, "plans": {name: one.to_dict() for name, one in answers.items()}}
        else:
            answers = {"": _answer(ask, stream=not as_json and sys.stdout.isatty())}
            result |= answers[""].to_dict()
        if report is not None:
            _write_report(report, pipe, request, [(plans[name], answer) for name, answer in answers.items()])
            result["report"] = str(report)
    if as_json:
        print_json(result)
    elif compare:
        _render.comparison(result)
    else:
        if not sys.stdout.isatty():
            print(result["text"], flush=True)
        stderr().print(_render.summary(result))
    if report is not None and not as_json:
        stderr().print(f"wrote {report}", style="default", highlight=False, markup=False, soft_wrap=True)
    if model == DEFAULT_MODEL and not as_json and not _is_bundled(clip):
        stderr().print(
            "\nThe embedded model answered, which knows only a toy world of moving shapes and beeps. "
            "For other clips choose a real model, for example --model videollama2 (fastav models lists them).",
            style="yellow",
        )


def _is_bundled(clip: str) -> bool:
    """Whether a clip is one of those that come with fastav."""
    from importlib.resources import files

    return Path(clip).resolve().parent == Path(str(files("fastav") / "assets" / "clips")).resolve()


def _request_of(clip: str, question: str | None, use: str) -> Request:
    """The request.  Raises: MediaError for media that cannot be read or lack a track that `use` requires."""
    if question is None and not clip.endswith(".json"):
        raise FastAVError("the argument QUESTION is missing", 'fastav run clip.mp4 "What do you hear?"')
    with spinner(f"reading {clip}"), suppress_warnings():
        from fastav.questions import read_conversation
        from fastav.request import Request, Use

        if question is None:
            request = read_conversation(Path(clip), use).request()
            if isinstance(request, FastAVError):
                raise request
        else:
            request = Request(clip=clip, question=question, use=Use(use))
        _ = request.tracks
    return request


def load_pipeline(
    model: str, plans: Sequence[str], device: str | None, dtype: str | None, engine: str, *, compare: bool = False
) -> Pipeline:
    """The pipeline with the first of the plans. All checks that need no weights come before loading.

    compare: whether the plans will be compared with the unpruned model; they must then prune, and have different names.
    """
    with spinner(f"reading {model}"), suppress_warnings():
        from fastav import pipelines
        from fastav.registry import ENGINES

        adapter, source, config = pipelines.resolve(model)
        resolved = [pipelines.plan_named(plan, adapter) for plan in plans]
        for name, plan in zip(plans, resolved, strict=True):
            if compare and not plan.steps:
                raise PlanError(
                    f"the plan {name!r} prunes nothing, so there is nothing to compare", "e.g. --plan fastav"
                )
            ENGINES[engine].check(config, plan, adapter=adapter)
        if len({_label(plan) for plan in resolved}) < len(resolved):
            raise PlanError("two of the plans have the same name", "give each plan once")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for answers
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    local = Path(source).is_dir()
    if not local and sys.stderr.isatty():
        print(f"loading {source} from the hub or its cache", file=sys.stderr)
    with (
        spinner(f"loading {model}") if local else nullcontext(),
        suppress_warnings(downloads=True),
        out_of_memory_as_error(),
    ):
        return pipelines.pipeline(model, resolved[0], engine=engine, device=device, dtype=dtype)


def _answer(ask: Callable[..., Answer], *, stream: bool) -> Answer:
    with spinner("watching and listening") as status:

        def print_piece(piece: str) -> None:
            if status:
                status.stop()
            print(printable(piece), end="", flush=True)

        answer = ask(on_text=print_piece if stream else None)
    if stream:
        print("\n", flush=True)
    return answer


def _label(plan: Plan) -> str:
    return plan.fingerprint if plan.name in ("", "none") else plan.name


def _compared(pipe: Pipeline, names: Sequence[str]) -> dict[str, Plan]:
    """The plans of a comparison by name, the unpruned one first."""
    from fastav.adapter import plan_named
    from fastav.presets import NONE

    return {NONE.name: NONE} | {_label(plan): plan for name in names for plan in [plan_named(name, pipe.adapter)]}


def _compare(plans: Mapping[str, Plan], ask: Callable[..., Answer], repeat: int) -> dict[str, Answer]:
    """The answer under each plan. Runs alternate, so that load on the machine affects all plans alike."""
    answers: dict[str, list[Answer]] = {name: [] for name in plans}
    with progress("running the plans in turn", len(plans) * (1 + repeat)) as step:
        for plan in plans.values():
            ask(plan=plan, max_new_tokens=2)  # warm-up: the first run sets up what later runs reuse
            step()
        for _ in range(repeat):
            for name, plan in plans.items():
                answers[name].append(ask(plan=plan))
                step()
    return {name: _median_run(runs) for name, runs in answers.items()}


def _median_run(answers: Sequence[Answer]) -> Answer:
    """The first answer, with the median seconds of every phase and the highest peak memory."""
    first = answers[0]
    seconds = {phase: median(answer.seconds[phase] for answer in answers) for phase in first.seconds}
    peaks = [answer.peak_bytes for answer in answers if answer.peak_bytes is not None]
    return replace(first, seconds=seconds, peak_bytes=max(peaks, default=None))


def _check_report(path: Path, engine: str) -> None:
    """Check, before the model loads, that a report can be made and written.  Raises: FastAVError."""
    require_folder(path, "--report")
    from fastav.engine import Engine
    from fastav.registry import ENGINES

    if ENGINES[engine].inspect is Engine.inspect:
        raise FastAVError(f"the engine {engine} does not expose its cuts for --report", "use --engine transformers")


def _write_report(path: Path, pipe: Pipeline, request: Request, runs: Sequence[tuple[Plan, Answer]]) -> None:
    """Write the page of these answers, each under its plan."""
    from fastav.report import answer_report, to_json
    from fastav.report.answer import run_of

    with progress("inspecting", len(runs)) as step:
        shown = []
        for plan, answer in runs:
            shown.append(run_of(to_json(pipe.inspect(request, plan=plan), request), answer))
            step()
    write_file(path, answer_report(shown))


def _run_info(pipe: Pipeline) -> dict[str, Any]:
    import torch
    import transformers

    versions = {"fastav": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": pipe.engine.device, "dtype": pipe.engine.dtype, "versions": versions}


@contextmanager
def out_of_memory_as_error() -> Iterator[None]:
    """Turn an out-of-memory exception into a FastAVError."""
    import torch

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(
            error
        )
        if not is_out_of_memory:
            raise
        raise FastAVError("out of memory", "try --dtype bfloat16, a shorter answer, or another --device") from None
