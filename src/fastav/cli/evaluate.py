"""`fastav eval`."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from fastav.cli import _help, _options, _plans, _scores
from fastav.cli._output import print_json
from fastav.cli._progress import spinner, suppress_warnings
from fastav.cli._rows import rows_path, write_rows
from fastav.cli._types import Evaluation, Plan, Task
from fastav.errors import PlanError, TaskError


def evaluate(
    model: _options.ModelName,
    task: _options.TaskName,
    plans: Annotated[
        list[str],
        typer.Option(
            metavar="A,B,...",
            autocompletion=_help.plans,
            help="Presets, recipes, .json files, or folders of them. Can be repeated.",
        ),
    ] = ["none,fastav"],  # noqa: B006  # typer takes the default of a list as a list
    retention: _options.Retention = None,
    folder: _options.Folder = None,
    limit: _options.Limit = None,
    families: _options.Families = None,
    jobs: _options.Jobs = 1,
    out: _options.Rows = None,
    keep_going: _options.KeepGoing = False,
    kl: Annotated[
        bool,
        typer.Option("--kl", help="Measure the KL divergence from the unpruned model too, at about twice the time."),
    ] = False,
    device: _options.Device = None,
    dtype: _options.Dtype = None,
    as_json: _options.Json = False,
) -> None:
    """Ask a model the questions of a benchmark under several plans, and compare scores and costs.

    Every plan answers the same clips with greedy decoding. --out FILE stores every answer. Run the same command again
    to continue. fastav leaderboard draws such files. docs/eval.md defines the statistics.
    """
    with spinner(f"reading {task}"), suppress_warnings():
        from fastav import evaluate as library

        evaluation = library.Evaluation.of(
            model,
            load_task(task, folder),
            plans_by_name(model, split_commas(plans), retention),
            families=split_commas(families or []),
            limit=limit,
            device=device,
            dtype=dtype,
            kl=kl,
        )
    report = run_evaluation(evaluation, jobs=jobs, keep_going=keep_going, out=out)
    if as_json:
        print_json(report)
    else:
        _scores.show(report)


def run_evaluation(evaluation: Evaluation, *, jobs: int, keep_going: bool, out: Path | None) -> dict[str, Any]:
    """The report of an evaluation after all missing rows are computed. Without `out`, the rows are not stored."""
    from fastav import evaluate as library

    with rows_path(out) as path, library.open_rows(path, evaluation.head()) as file:
        remaining = sum(len(plans) for _, plans in evaluation.remaining(file.rows))
        rows = evaluation.rows(file.rows, jobs=jobs, keep_going=keep_going)
        title = f"{evaluation.setup.model}, {evaluation.task.name}"
        write_rows(rows, file, title=title, remaining=remaining, noun="answer", out=out)
        return library.report(file.results, evaluation.metrics(file.rows))


def load_task(name: str, folder: Path | None) -> Task:
    """The task of this name.  Raises: UnknownName, TaskError."""
    from fastav.registry import TASKS

    kind = TASKS[name]
    if kind.needs_folder and folder is None:
        raise TaskError(
            f"{name} needs its annotations and clips", f"give --folder DIR; you can get them from {kind.source}"
        )
    return kind(folder)


def split_commas(values: Sequence[str]) -> list[str]:
    """The parts of values that can each have several parts, separated by commas."""
    return [part for value in values for part in map(str.strip, value.split(",")) if part]


def plans_by_name(model: str, names: Sequence[str], retention: str | None = None) -> dict[str, Plan]:
    """The plans by the names that rows carry: as given, or a file's name without .json. A folder means all its plans.

    retention: a target for all of them but `none`.
    Raises: PlanError if two plans have one name or a folder has no plans; as `pipelines.plan_named`.
    """
    from fastav import pipelines

    adapter, _, _ = pipelines.resolve(model)
    plans: dict[str, Plan] = {}
    for name in chain.from_iterable(map(_expand_folder, names)):
        label = Path(name).stem if name.endswith(".json") else name
        target = None if name == "none" else retention
        plan, label = pipelines.plan_named(_plans.aimed(name, target), adapter), _plans.aimed(label, target)
        if plans.setdefault(label, plan) != plan:
            raise PlanError(f"two plans have the name {label!r}", "rename one of the files")
    return plans


def _expand_folder(name: str) -> list[str]:
    if not Path(name).is_dir():
        return [name]
    if paths := sorted(str(path) for path in Path(name).glob("*.json")):
        return paths
    raise PlanError(f"there are no plans in the folder {name!r}", "fastav plan write NAME --out FILE.json writes one")
