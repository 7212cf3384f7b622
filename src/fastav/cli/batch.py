"""`fastav batch`."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from fastav.cli import _options, _plans
from fastav.cli._output import print_json
from fastav.cli._progress import progress, spinner, suppress_warnings
from fastav.cli._text import duration, number, print_note
from fastav.cli._types import Answer
from fastav.cli.run import DEFAULT_MODEL, load_pipeline, out_of_memory_as_error
from fastav.errors import FastAVError
from fastav.files import atomic_write
from fastav.formatting import plural
from fastav.questions import Question, read_questions

EXIT_SOME_FAILED = 1  # the exit code


def batch(
    questions: Annotated[Path, typer.Argument(metavar="QUESTIONS", help="JSON lines file of questions.")],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="File of answers. New answers are appended; existing ones are kept.")
    ],
    model: _options.Model = DEFAULT_MODEL,
    plan: _options.PlanName = "fastav",
    retention: _options.Retention = None,
    batch_size: Annotated[
        int, typer.Option("--batch", min=1, metavar="N", help="Questions per batch; use 64 or more with vllm.")
    ] = 8,
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
    as_json: _options.Json = False,
) -> None:
    """Answer a file of questions about clips.

    Each line of QUESTIONS is a JSON object with clip (a path relative to the file's folder) and question, or with chat
    messages. It can also have id (default: the line number) and use.

    Each line of FILE is a JSON object with id, text, finish, prompt_tokens, new_tokens, flops, kv_bytes, model, plan
    and fingerprint. For a question that failed it has id, error, model, plan and fingerprint. Answers come in any
    order.

    Run the same command again to continue and to retry failed questions. --json prints the counts of this run. See
    docs/batches.md.

    The exit code is 1 if some questions failed.
    """
    all_questions, plan = read_questions(questions, use), _plans.aimed(plan, retention)
    settings = _options.generation_settings(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    plan_fields = _plan_fields(model, plan)
    answers = _read_answers(out, plan_fields)
    remaining = [question for question in all_questions if question.id not in answers]
    if answers:
        print_note(
            f"{out} has {plural(len(all_questions) - len(remaining), 'answer')}; {number(len(remaining))} missing"
        )
    if not remaining:
        if as_json:
            print_json({"path": str(out), "answers": 0, "failures": 0, "seconds": 0.0})
        return
    pipe = load_pipeline(model, [plan], device, dtype, engine)
    start, failures = time.perf_counter(), []
    with (
        pipe,
        out_of_memory_as_error(),
        suppress_warnings(),
        _answer_writer(out, answers.values()) as append,
        progress(model, len(remaining)) as step,
        closing(pipe.map(map(Question.request, remaining), batch=batch_size, **settings)) as outcomes,
    ):
        for index, outcome in outcomes:
            if isinstance(outcome, FastAVError):
                failures.append(f"{remaining[index].id}: {' '.join(outcome.message.split())}")
            append({"id": remaining[index].id} | _outcome_fields(outcome) | plan_fields)
            step()
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "path": str(out),
                "answers": len(remaining) - len(failures),
                "failures": len(failures),
                "seconds": seconds,
            }
        )
    print_note(f"{plural(len(remaining) - len(failures), 'answer')} in {duration(seconds)}: {out}")
    if failures:
        print_note(f"{number(len(failures))} failed; the first is {failures[0]}")
        raise typer.Exit(EXIT_SOME_FAILED)


# --- answers


def _plan_fields(model: str, plan: str) -> dict[str, str]:
    """The fields of every line that identify the model and the plan."""
    with spinner(f"reading {model}"), suppress_warnings():
        from fastav import pipelines

        adapter, _, _ = pipelines.resolve(model)
        resolved = pipelines.plan_named(plan, adapter)
    return {"model": model, "plan": resolved.name or resolved.fingerprint, "fingerprint": resolved.fingerprint}


def _read_answers(path: Path, plan_fields: Mapping[str, str]) -> dict[str | int, bytes]:
    """The lines of a file with answers, by id, without failures and without an incomplete last line.

    Raises: FastAVError if the file has anything but answers, has answers of another model or plan, or is no file.
    """
    if path.is_dir():
        raise FastAVError(f"{path} is a folder", "--out must be a file")
    if not path.parent.is_dir():
        raise FastAVError(f"the folder {path.parent} does not exist", "create it, or give another --out")
    if not path.is_file():
        return {}
    answers: dict[str | int, bytes] = {}
    for line, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            entry = json.loads(text)
            model, plan, fingerprint, name = (entry[key] for key in (*plan_fields, "id"))
        except (ValueError, TypeError, KeyError):
            raise FastAVError(
                f"line {line} of {path} is not an answer of fastav batch", "delete that line, or give another --out"
            ) from None
        if model != plan_fields["model"]:
            raise FastAVError(f"{path} has answers of {model}, not {plan_fields['model']}", "give another --out")
        if fingerprint != plan_fields["fingerprint"]:
            actual = f"{plan} ({fingerprint}), not {plan_fields['plan']} ({plan_fields['fingerprint']})"
            raise FastAVError(f"{path} has answers of the plan {actual}", "give another --out")
        if "error" not in entry:
            answers[name] = text + b"\n"
    return answers


@contextmanager
def _answer_writer(path: Path, before: Iterable[bytes]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends a line to a file, after the lines in `before`. After Ctrl-C it prints how to continue."""
    if path.is_file():
        with atomic_write(path) as part:
            part.write_bytes(b"".join(before))
    with path.open("ab") as file:
        try:
            yield partial(_append, file)
        except KeyboardInterrupt:
            print_note(f"\nthe answers so far are in {path}; run the same command again to continue")
            raise


def _append(file: BinaryIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line).encode() + b"\n")
    file.flush()


def _outcome_fields(outcome: Answer | FastAVError) -> dict[str, Any]:
    """The fields of a line that describe an answer or a failure."""
    if isinstance(outcome, FastAVError):
        return {"error": str(outcome)}
    return {
        "text": outcome.text,
        "finish": outcome.finish,
        "prompt_tokens": dict(outcome.prompt_tokens),
        "new_tokens": len(outcome.token_ids),
        "flops": outcome.flops.to_dict(),
        "kv_bytes": outcome.kv_bytes.to_dict(),
    }
