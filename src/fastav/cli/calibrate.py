"""`fastav calibrate`."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastav.cli import _options, _plans
from fastav.cli._output import print_json, write_file
from fastav.cli._progress import progress, spinner, suppress_warnings
from fastav.cli._text import print_error, print_note
from fastav.errors import CalibrationError
from fastav.formatting import plural


def calibrate(
    model: _options.ModelName,
    clips: Annotated[list[str], typer.Argument(metavar="CLIPS", help="Video or audio files, or folders of them.")],
    questions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Questions: a line each, or JSON, also by the clip's file name."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the plan goes.")] = Path("plan.json"),
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Where a page with the evidence goes.")] = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keeps what was seen.  [default: OUT with .calibration for .json]"),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SHARE", help="FLOPs of the prefill to reach, 0.56 being 56 %.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Instead: audio and video tokens to keep at the global cut.")
    ] = None,
    rule: Annotated[
        Literal["even", "first", "frames", "before", "auto", "rollout"],
        typer.Option(help="Which tokens the global cut keeps; auto: the best of first, frames and before."),
    ] = "even",
    start: Annotated[
        str, typer.Option(metavar="LAYER", help="Layer of the global cut: a number, middle, or concentration.")
    ] = "middle",
    drop: _options.Drop = None,
    alpha: Annotated[float, typer.Option(help="Weight of attention against the residual in the rollout.")] = 0.5,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Skip clips that fail, and tell of them.")] = False,
    device: _options.Device = None,
    dtype: _options.Dtype = None,
    as_json: _options.Json = False,
) -> None:
    """Look at where a model's attention goes on a few clips, and read a plan off it.

    The same command again goes on where the last one was stopped; other --budget, --rule, --start and --drop take what
    was seen already. docs/calibrate.md defines the rules.
    """
    if out.suffix != ".json":
        raise CalibrationError(f"a plan's file must end in .json, got {str(out)!r}", "--plan reads only those")
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
            from fastav import report as page  # a missing extra shows before the work
        question_list = () if questions is None else library.read_questions(questions)
        calibration = library.Calibration.of(
            model, clips, question_list, folder=folder, alpha=alpha, device=device, dtype=dtype
        )
    failures = _trace_prompts(calibration, folder, keep_going=keep_going)
    with spinner("choosing"), suppress_warnings():
        choice = calibration.finish(criterion, failures=failures)
        write_file(out, choice.plan.to_json() + "\n")
        if report is not None:
            write_file(report, page.page(folder))  # pyright: ignore[reportPossiblyUnboundVariable]
    for failure in failures:
        print_error(f"skipped {failure.prompt.clip}: {failure.reason}")
    if as_json:
        fields = {key: value for key, value in asdict(choice).items() if key != "plan"}
        print_json(fields | {"plan": json.loads(choice.plan.to_json()), "failures": len(failures)})
    else:
        _print_choice(choice, model, [str(path) for path in (out, report) if path is not None])


def _trace_prompts(calibration: Any, folder: Path, *, keep_going: bool) -> list[Any]:
    """Look at the prompts that are left, with a bar on a terminal; after Ctrl-C say how to go on."""
    from fastav.calibrate import Failure

    remaining, failures = len(calibration.remaining()), []
    if remaining < len(calibration.prompts):
        print_note(f"{folder} has {plural(len(calibration.prompts) - remaining, 'prompt')}; {remaining} missing")
    try:
        with progress(f"looking at {calibration.model}", remaining) as step, suppress_warnings():
            for outcome in calibration.run(keep_going=keep_going):
                failures += [outcome] if isinstance(outcome, Failure) else []
                step()
    except CalibrationError as error:
        raise CalibrationError(error.message, "; ".join(filter(None, (error.hint, "--keep-going skips it")))) from error
    except KeyboardInterrupt:
        print_note(f"\nwhat was seen is in {folder}; the same command goes on from there")
        raise
    return failures


def _parse_start(text: str) -> Any:
    if text in ("middle", "concentration"):
        return text
    if text.isdecimal():
        return int(text)
    raise CalibrationError(f"--start must be a layer's number, middle or concentration, got {text!r}")


def _print_choice(choice: Any, model: str, files: list[str]) -> None:
    """What was chosen, and how it is used."""
    print(f"entering layer {choice.start}, {choice.tokens:.0f} tokens of audio and video stay (rule {choice.rule})")
    if choice.held is not None:
        print(f"they hold {choice.held:.0%} of the rollout that audio and video have there")
    print(f"FLOPs of the prefill: {choice.flops:.1%} of unpruned")
    command = shlex.join(["fastav", "run", "CLIP", "QUESTION", "--model", model, "--plan", files[0]])
    print(f"wrote {' and '.join(files)}; try {command}")
