"""`fastav ablate`."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from fastav.cli import _options, _scores
from fastav.cli._output import print_json
from fastav.cli._progress import spinner, suppress_warnings
from fastav.cli._text import number, width
from fastav.cli.evaluate import load_task, run_evaluation, split_commas

FIXED_WIDTH, FAMILY_WIDTH = 60, 22  # screen columns of a table without families, and of one family
NOTE = (
    "* FastAV's own setting; a strategy is named after what it removes; FLOPs: of the unpruned prefill; score: of 100 "
    "points, with Wilson's 95 % interval; mean: over all samples"
)


def ablate(
    model: _options.ModelName,
    task: _options.TaskName,
    tables: Annotated[
        list[str], typer.Option(metavar="A,B,...", help="Tables: global, fine, start, drop. Can be repeated.")
    ] = ["global,fine,start,drop"],  # noqa: B006  # typer takes the default of a list as a list
    plan: _options.PlanName = "fastav",
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
    """Rerun the paper's ablations of FastAV on any model and benchmark.

    There are four tables. global: the global cut alone, by what it removes. fine: the fine cuts after the global cut,
    by what they remove. start: the layer of the global cut. drop: the share P that every fine cut removes. All rows of
    the first two tables cost the same.

    Every plan answers the same clips with greedy decoding. A plan that is in several tables runs once. --out FILE
    stores every answer as fastav eval does; run the same command again to continue. docs/ablations.md defines the rows.
    """
    with spinner(f"reading {task}"), suppress_warnings():
        from fastav import ablations, pipelines
        from fastav import evaluate as library

        adapter, _, config = pipelines.resolve(model)
        ablation_tables = ablations.tables(
            pipelines.plan_named(plan, adapter), adapter.shape(config).layers, split_commas(tables)
        )
        evaluation = library.Evaluation.of(
            model,
            load_task(task, folder),
            ablations.plans(ablation_tables),
            families=split_commas(families or []),
            limit=limit,
            device=device,
            dtype=dtype,
        )
    report = run_evaluation(evaluation, jobs=jobs, keep_going=keep_going, out=out)
    report["tables"] = [
        {
            "name": table.name,
            "title": table.title,
            "rows": [{"label": row.label, "plan": row.plan.name, "fastav": row.is_original} for row in table.settings],
        }
        for table in ablation_tables
    ]
    if as_json:
        print_json(report)
    else:
        _scores.screen(report, _titled_tables(report), NOTE)


def _titled_tables(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The tables, each below its title."""
    for table in report["tables"]:
        yield Text(table["title"], "bold")
        yield from _family_tables(table, report["plans"])


def _family_tables(table: Mapping[str, Any], plans: Mapping[str, Any]) -> Iterator[RenderableType]:
    """One table in the paper's layout. Families that do not fit the screen go to further tables."""
    from fastav.evaluate import formatting

    labels = [row["label"] + " *" * row["fastav"] for row in table["rows"]]
    results = [plans[row["plan"]] for row in table["rows"]]
    families = [
        (name, [formatting.score(plan["families"][name]) for plan in results]) for name in results[0]["families"]
    ]
    families = families if len(families) > 1 else []
    totals = [plan["all"] for plan in results]
    flops = ("FLOPs", [formatting.percent(plan["flops_ratio"]) for plan in totals])
    mean = ("mean", [formatting.score(plan) for plan in totals])
    n = ("n", [number(plan["n"]) for plan in totals])
    per_table = max(1, (width() - FIXED_WIDTH) // FAMILY_WIDTH)
    retention = ("retention", [formatting.percent(plan["mean_retention"]) for plan in totals])
    first = [retention, flops, *families[:per_table], mean, n]
    for columns in (first, *(families[at : at + per_table] for at in range(per_table, len(families), per_table))):
        headings, values = zip(*columns, strict=True)
        yield _scores.table([table["name"], *headings], list(zip(labels, *values, strict=True)))
