"""`fastav batch`."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from fastav.cli import _options
from fastav.cli._output import print_json
from fastav.cli._progress import progress, spinner, suppress_warnings
from fastav.cli._text import duration, number, print_note
from fastav.cli._types import Answer, Clip, Request
from fastav.cli.run import DEFAULT_MODEL, load_pipeline, out_of_memory_as_error
from fastav.errors import FastAVError
from fastav.files import atomic_write
from fastav.formatting import plural

EXIT_SOME_FAILED = 1  # the exit code


def batch(
    questions: Annotated[Path, typer.Argument(metavar="QUESTIONS", help="JSON lines file of questions.")],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="File of answers. New answers are appended; existing ones are kept.")
    ],
    model: _options.Model = DEFAULT_MODEL,
    plan: _options.PlanName = "fastav",
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

    Each line of QUESTIONS is a JSON object with clip (a path relative to the file's folder) and question. It can also
    have id (default: the line number) and use.

    Each line of FILE is a JSON object with id, text, finish, prompt_tokens, new_tokens, flops, kv_bytes, model, plan
    and fingerprint. For a question that failed it has id, error, model, plan and fingerprint. Answers come in any
    order.

    Run the same command again to continue and to retry failed questions. --json prints the counts of this run. See
    docs/batches.md.

    The exit code is 1 if some questions failed.
    """
    all_questions = _read_questions(questions, use)
    sampling = _options.sampling(temperature, top_p, top_k, repetition_penalty, stop, seed)
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
    ):
        options = {"batch": batch_size, "max_new_tokens": max_new_tokens, "sampling": sampling}
        with closing(pipe.map(map(_make_request, remaining), **options)) as outcomes:
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


# --- questions


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    id: str | int
    clip: str
    text: str
    use: str


def _read_questions(path: Path, use: str) -> list[_Question]:
    """The questions of a file.  Raises: FastAVError."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise FastAVError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FastAVError(f"{path} is not UTF-8 text") from None
    questions: dict[str | int, _Question] = {}
    numbers: dict[str | int, int] = {}
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            question = _parse_question(json.loads(text), line, path.parent, use)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise FastAVError(
                f"line {line} of {path}: {reason}", 'a line is like {"clip": "a.mp4", "question": "What do you hear?"}'
            ) from None
        if question.id in questions:
            raise FastAVError(
                f"line {line} of {path}: the id {question.id!r} is already used on line {numbers[question.id]}"
            )
        questions[question.id], numbers[question.id] = question, line
    if not questions:
        raise FastAVError(f"{path} has no questions")
    return list(questions.values())


def _parse_question(entry: Any, line: int, folder: Path, use: str) -> _Question:
    """Raises: ValueError."""
    if not isinstance(entry, dict):
        raise ValueError("it is not an object")
    for name in ("clip", "question"):
        if not isinstance(entry.get(name), str):
            raise ValueError(f"{name} must be a string, got {entry.get(name)!r}")
        if not entry[name].strip():
            raise ValueError(f"the {name} is empty")
    id_, question_use = entry.get("id", line), entry.get("use", use)
    if type(id_) not in (str, int):
        raise ValueError(f"id must be a string or an integer, got {id_!r}")
    if question_use not in ("auto", "both", "video", "audio"):
        raise ValueError(f"use must be auto, both, video or audio, got {question_use!r}")
    clip = entry["clip"] if "://" in entry["clip"] else str(folder / entry["clip"])
    return _Question(id=id_, clip=clip, text=entry["question"], use=question_use)


def _make_request(question: _Question) -> Request | FastAVError:
    """The request for a question, or the error that prevents it."""
    from fastav.batches import as_failure
    from fastav.request import Request, Use

    try:
        return Request(clip=_open_clip(question.clip), question=question.text, use=Use(question.use))
    except Exception as error:  # one bad file must not stop the other questions
        return as_failure(error)


@lru_cache(maxsize=64)
def _open_clip(clip: str) -> Clip:
    """The clip, cached because neighbouring questions often share one."""
    from fastav.media import Clip

    return Clip.open(clip)


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
