"""`fastav eval`."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from fastav.cli import _help, _options, _scores
from fastav.cli._json import print_json
from fastav.cli._quiet import counting, hushed, working
from fastav.cli._text import stderr
from fastav.errors import PlanError, TaskError
from fastav.wording import counted


def evaluate(
    model: _options.ModelName,
    task: _options.TaskName,
    plans: Annotated[
        list[str],
        typer.Option(
            metavar="A,B,...",
            autocompletion=_help.plans,
            help="Presets, recipes, .json files, folders of them. May be given again.",
        ),
    ] = ["none,fastav"],  # noqa: B006  # typer takes the default of a list as a list
    folder: _options.Folder = None,
    limit: _options.Limit = None,
    families: _options.Families = None,
    jobs: _options.Jobs = 1,
    out: _options.Rows = None,
    keep_going: _options.KeepGoing = False,
    device: _options.Device = None,
    dtype: _options.Dtype = None,
    as_json: _options.Json = False,
) -> None:
    """Ask a model a benchmark's questions under several plans, and compare scores and costs.

    Every plan answers the same clips, greedily. --out FILE keeps every answer; the same command again goes on where
    the last one was stopped, and fastav leaderboard draws such files. docs/eval.md defines the statistics.
    """
    with working(f"reading {task}"), hushed():
        from fastav import evaluate as library

        evaluation = library.Evaluation.of(
            model,
            task_named(task, folder),
            _plans(model, listed(plans)),
            families=listed(families or []),
            limit=limit,
            device=device,
            dtype=dtype,
        )
    report = reported(evaluation, jobs=jobs, keep_going=keep_going, out=out)
    if as_json:
        print_json(report)
    else:
        _scores.show(report)


def reported(evaluation: Any, *, jobs: int, keep_going: bool, out: Path | None) -> dict[str, Any]:
    """What the file says once the missing rows are in it; `out` is None for a file that nobody keeps."""
    from fastav import evaluate as library

    with _kept(out) as path, library.opened(path, evaluation.head()) as file:
        _answer(evaluation, file, jobs=jobs, keep_going=keep_going, out=out)
        return library.report(file.stored, evaluation.metrics(file.rows))


def task_named(name: str, folder: Path | None) -> Any:
    """Raises: UnknownName, TaskError."""
    from fastav.registry import TASKS

    kind = TASKS[name]
    if kind.needs_folder and folder is None:
        raise TaskError(f"{name} needs its annotations and clips", f"--folder DIR; {kind.source} has them")
    return kind(folder)


def listed(values: Sequence[str]) -> list[str]:
    """The parts of values that may hold several, separated by commas."""
    return [part for value in values for part in map(str.strip, value.split(",")) if part]


def _answer(evaluation: Any, file: Any, *, jobs: int, keep_going: bool, out: Path | None) -> None:
    """Write the missing rows, with a bar on a terminal; after Ctrl-C say how to go on."""
    left = sum(len(plans) for _, plans in evaluation.left(file.rows))
    if file.rows:
        _say(f"{out} has {counted(len(file.rows), 'answer')}; {left:,} missing")
    try:
        with counting(f"{evaluation.setup.model}, {evaluation.task.name}", left) as step, hushed():
            for row in evaluation.rows(file.rows, jobs=jobs, keep_going=keep_going):
                file.append(row)
                step()
    except KeyboardInterrupt:
        after = f"are in {out}; the same command goes on from there" if out else "are lost; --out FILE keeps them"
        _say(f"\n{counted(len(file.rows), 'answer')} {after}")
        raise


@contextmanager
def _kept(out: Path | None) -> Iterator[Path]:
    """The file, or one that nobody keeps."""
    if out is not None:
        yield out
    else:
        with TemporaryDirectory() as folder:
            yield Path(folder, "rows.jsonl")


def _plans(model: str, names: Sequence[str]) -> dict[str, Any]:
    """Plans by the names that rows carry: as given, or a file's without .json; a folder holds several.

    Raises: PlanError if two plans have one name, or a folder holds none; as `pipelines.plan_named`.
    """
    from fastav import pipelines

    adapter, _, _ = pipelines.resolve(model)
    plans: dict[str, Any] = {}
    for name in chain.from_iterable(map(_expanded, names)):
        label = Path(name).stem if name.endswith(".json") else name
        plan = pipelines.plan_named(name, adapter)
        if plans.setdefault(label, plan) != plan:
            raise PlanError(f"two plans are called {label!r}", "rename one of the files")
    return plans


def _expanded(name: str) -> list[str]:
    if not Path(name).is_dir():
        return [name]
    if found := sorted(str(path) for path in Path(name).glob("*.json")):
        return found
    raise PlanError(f"there are no plans in the folder {name!r}", "fastav plan write NAME --out FILE.json writes one")


def _say(text: str) -> None:
    if sys.stderr is not None:
        stderr().print(text, soft_wrap=True)
