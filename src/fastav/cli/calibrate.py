"""`fastav calibrate`."""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastav.cli import _options, _plans
from fastav.cli._output import print_json, write_file
from fastav.cli._progress import progress, spinner, suppress_warnings
from fastav.cli._text import print_error, print_note
from fastav.cli._types import Calibration, CalibrationFailure, Choice, Prompt
from fastav.errors import CalibrationError
from fastav.formatting import plural


def calibrate(
    model: _options.ModelName,
    clips: Annotated[list[str], typer.Argument(metavar="CLIPS", help="Video or audio files, or folders of them.")],
    questions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Questions, one per line; or JSON, for all clips or by the clip's file name."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File for the plan.")] = Path("plan.json"),
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File for an HTML page with the evidence.")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the traces.  [default: OUT with .calibration instead of .json]"),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Target share of the prefill FLOPs.  [default: 0.56]")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Instead of --budget: audio and video tokens to keep at the global cut."),
    ] = None,
    rule: Annotated[
        Literal["even", "first", "frames", "before", "auto", "rollout"],
        typer.Option(help="Which tokens the global cut keeps; auto is the best of first, frames and before."),
    ] = "even",
    start: Annotated[
        str, typer.Option(metavar="LAYER", help="Layer of the global cut: a number, middle or concentration.")
    ] = "middle",
    drop: _options.Drop = None,
    alpha: Annotated[float, typer.Option(help="Weight of attention in the rollout; the residual has 1 - alpha.")] = 0.5,
    answers: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Prompts to answer with and without the plan, at most, evenly spread; 0 for none.",
        ),
    ] = 64,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Skip clips that fail, and report them.")] = False,
    device: _options.Device = None,
    dtype: _options.Dtype = None,
    as_json: _options.Json = False,
) -> None:
    """Trace a model's attention on a few clips, derive a plan from it, and compare its answers with the unpruned ones.

    Run the same command again to continue. Other values of --budget, --rule, --start and --drop reuse the stored
    traces. docs/calibrate.md defines the rules.
    """
    if out.suffix != ".json":
        raise CalibrationError(f"the file of a plan must end in .json, got {str(out)!r}", "--plan reads only those")
    folder = work or out.with_suffix(".calibration")
    with spinner(f"reading {model}"), suppress_warnings():
        from fastav import calibrate as library

        criterion = library.Criterion(
            budget=library.Criterion.budget if budget is None and tokens is None else budget,
            tokens=tokens,
            start=_parse_start(start),
            rule=rule,
            drop=library.Criterion.drop if drop is None else _plans.share(drop),
        )
        if report is not None:
            import fastav.report.calibration  # noqa: F401  # reports a missing extra before the work starts
        question_list = () if questions is None else library.read_questions(questions)
        calibration = library.Calibration.of(
            model, clips, question_list, folder=folder, alpha=alpha, device=device, dtype=dtype
        )
    failures = _trace_prompts(calibration, folder, keep_going=keep_going)
    with spinner("choosing"), suppress_warnings():
        choice = calibration.choose(criterion)
    failures += _answer_prompts(calibration, choice, folder, answers, keep_going=keep_going)
    with spinner("writing"), suppress_warnings():
        calibration.finish(choice, failures=failures, answers=answers)
        comparison = calibration.store.comparison()
        summary = None if comparison is None else comparison.summary()
        write_file(out, choice.plan.to_json() + "\n")
        if report is not None:
            from fastav.report import page

            write_file(report, page(folder))
    for failure in failures:
        print_error(f"skipped {failure.prompt.clip}: {failure.reason}")
    if as_json:
        fields = {key: value for key, value in asdict(choice).items() if key != "plan"}
        plan = json.loads(choice.plan.to_json())
        print_json(fields | {"plan": plan, "failures": len(failures), "answers": summary})
    else:
        _print_choice(choice)
        if summary is not None:
            _print_answers(summary)
        files = [str(path) for path in (out, report) if path is not None]
        command = shlex.join(["fastav", "run", "CLIP", "QUESTION", "--model", model, "--plan", files[0]])
        print(f"wrote {' and '.join(files)}; try {command}")


def _trace_prompts(calibration: Calibration, folder: Path, *, keep_going: bool) -> list[CalibrationFailure]:
    """Trace the prompts that remain, with a progress bar on a terminal. After Ctrl-C, print how to continue."""
    remaining = len(calibration.remaining())
    if remaining < len(calibration.prompts):
        print_note(f"{folder} has {plural(len(calibration.prompts) - remaining, 'prompt')}; {remaining} missing")
    outcomes = calibration.run(keep_going=keep_going)
    return _consume(outcomes, f"tracing {calibration.model}", remaining, f"the traces so far are in {folder}")


def _answer_prompts(
    calibration: Calibration, choice: Choice, folder: Path, answers: int, *, keep_going: bool
) -> list[CalibrationFailure]:
    """Answer the prompts that have no answers yet, as `_trace_prompts` traces them."""
    remaining = len(calibration.unanswered(choice, answers=answers))
    outcomes = calibration.answer(choice, answers=answers, keep_going=keep_going)
    return _consume(outcomes, f"answering {calibration.model}", remaining, f"the answers so far are in {folder}")


def _consume(
    outcomes: Iterable[Prompt | CalibrationFailure], what: str, number: int, after_interrupt: str
) -> list[CalibrationFailure]:
    """The failures among the outcomes of so many prompts, with a progress bar."""
    from fastav.calibrate import Failure

    failures: list[CalibrationFailure] = []
    try:
        with progress(what, number) as step, suppress_warnings():
            for outcome in outcomes:
                failures += [outcome] if isinstance(outcome, Failure) else []
                step()
    except CalibrationError as error:
        raise CalibrationError(error.message, "; ".join(filter(None, (error.hint, "--keep-going skips it")))) from error
    except KeyboardInterrupt:
        print_note(f"\n{after_interrupt}; run the same command again to continue")
        raise
    return failures


def _parse_start(text: str) -> str | int:
    if text in ("middle", "concentration"):
        return text
    if text.isdecimal():
        return int(text)
    raise CalibrationError(f"--start must be a layer number, middle or concentration, got {text!r}")


def _print_choice(choice: Choice) -> None:
    """Print the chosen plan."""
    print(f"at layer {choice.start}, {choice.tokens:.0f} audio and video tokens stay (rule {choice.rule})")
    if choice.held is not None:
        print(f"they hold {choice.held:.0%} of the rollout of audio and video")
    print(f"prefill FLOPs: {choice.flops:.1%} of unpruned")


def _print_answers(summary: Mapping[str, Any]) -> None:
    """Print how far the answers agree, and what they took."""
    n = summary["n"]
    if not n:
        print("no prompt has an answer")
        return
    low, high = summary["exact"]["interval"]
    same = n - len(summary["differences"])
    print(f"answers: {same} of {n} equal the unpruned ones (95 % interval {low:.0%} to {high:.0%})")
    names = {"prefill": "prefill", "decode_per_token": "decoding of a token"}
    ratios = [(name, summary["time_ratio"][phase]) for phase, name in names.items()]
    if measured := [f"{name} {ratio['median']:.0%}" for name, ratio in ratios if ratio is not None]:
        noisy = ", noisy because few" if summary["noisy"] else ""
        print(f"measured time: {', '.join(measured)} of unpruned (median of {plural(n, 'prompt')}{noisy})")
