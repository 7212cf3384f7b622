"""`fastav verify`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastav.cli import _help, _losses, _options
from fastav.cli._output import print_json, require_folder, write_file
from fastav.cli._progress import spinner, suppress_warnings
from fastav.cli._rows import rows_path, write_rows
from fastav.cli._text import number, print_note
from fastav.cli._types import Plan
from fastav.cli.evaluate import plans_by_name, split_commas
from fastav.errors import FastAVError
from fastav.formatting import plural

EXIT_NOT_MET = 1  # the exit code
THRESHOLDS = "Thresholds"  # the heading in the help


def verify(
    model: _options.ModelName,
    questions: Annotated[
        Path, typer.Argument(metavar="QUESTIONS", help="JSON lines file of questions, as for fastav batch.")
    ],
    plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B,...",
            autocompletion=_help.plans,
            help="Presets, recipes, .json files, or folders of them. Can be repeated.  "
            "[default: fastav; with --choose all presets and recipes]",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(metavar="NATS", rich_help_panel=THRESHOLDS, help="The largest mean KL divergence of a plan."),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            rich_help_panel=THRESHOLDS,
            help="The smallest share of answers equal to the unpruned ones, from 0 to 1.",
        ),
    ] = None,
    choose: Annotated[
        bool,
        typer.Option(
            "--choose", rich_help_panel=THRESHOLDS, help="Name the cheapest plan whose intervals meet the thresholds."
        ),
    ] = False,
    use: _options.Use = "auto",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum length of an answer in tokens.")
    ] = 128,
    batch_size: Annotated[
        int, typer.Option("--batch", min=1, metavar="N", help="Questions per batch; seconds are then the batch's.")
    ] = 1,
    out: _options.Rows = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a report as one HTML page.")] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Record questions that fail, and continue.")] = False,
    device: _options.Device = None,
    dtype: _options.Dtype = None,
    as_json: _options.Json = False,
) -> None:
    """Measure what plans lose on your own questions, without labels.

    Each question is answered unpruned and under every plan, with greedy decoding. The command compares the answers, and
    the distributions of the next token along the unpruned answer (KL divergence).

    --out FILE stores every question. Run the same command again to continue. docs/verify.md defines the measures.

    The exit code is 1 if a plan does not meet a threshold, if --choose finds no plan, or if questions failed.
    """
    with spinner(f"reading {model}"), suppress_warnings():
        from fastav import verify as library

        thresholds = library.Thresholds(max_kl=max_kl, min_agreement=min_agreement)
        if choose and not thresholds:
            raise FastAVError("--choose needs a threshold", "give --max-kl, --min-agreement or both")
        if html is not None:
            require_folder(html, "--html")
            import fastav.report.losses  # noqa: F401  # reports a missing extra before the work starts
        plans, skipped = _plans(model, plan, choose=choose)
        verification = library.Verification.of(
            model, questions, plans, use=use, max_new_tokens=max_new_tokens, device=device, dtype=dtype
        )
    with rows_path(out) as path, library.open_rows(path, verification.head()) as file:
        remaining = len(verification.remaining(file.rows))
        rows = verification.rows(file.rows, batch=batch_size, keep_going=keep_going)
        write_rows(rows, file, title=f"verifying {model}", remaining=remaining, noun="question", out=out)
        results = file.results
    report = library.report(results)
    report["thresholds"] = {"max_kl": max_kl, "min_agreement": min_agreement}
    for name, measures in report["plans"].items():
        report["plans"][name] = {**measures, "unmet": thresholds.unmet(measures) if thresholds else []}
    report["skipped"] = skipped
    report["choice"] = thresholds.choose(report) if choose else None
    if html is not None:
        from fastav.report import losses_page

        write_file(html, losses_page(results, report))
    if as_json:
        print_json(report)
    else:
        _losses.show(report)
    _print_verdict(report)
    if _is_failure(report):
        raise typer.Exit(EXIT_NOT_MET)


def _plans(model: str, names: list[str] | None, *, choose: bool) -> tuple[dict[str, Plan], dict[str, str]]:
    """The plans by name, and those left out with the reason.

    Raises: as `plans_by_name`; UnsupportedPlan if no preset or recipe can run.
    """
    if names is not None or not choose:
        return plans_by_name(model, split_commas(["fastav"] if names is None else names)), {}
    from fastav import pipelines
    from fastav.errors import UnsupportedPlan
    from fastav.registry import ENGINES, RECIPES

    adapter, _, config = pipelines.resolve(model)
    plans: dict[str, Plan] = {}
    skipped: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in dict.fromkeys([*adapter.presets, *RECIPES]):
        plan = pipelines.plan_named(name, adapter)
        try:
            ENGINES["transformers"].check(config, plan, adapter=adapter)
        except FastAVError as error:
            skipped[name] = error.message
            continue
        if not plan.steps:
            skipped[name] = "it prunes nothing"
        elif plan.fingerprint in seen:
            skipped[name] = f"it is the same plan as {seen[plan.fingerprint]}"
        else:
            plans[name], seen[plan.fingerprint] = plan, name
    if not plans:
        raise UnsupportedPlan(f"no preset or recipe can prune {model}", "give --plan")
    return plans, skipped


def _print_verdict(report: Mapping[str, Any]) -> None:
    """Say on stderr which thresholds are not met, which plan is chosen, and what failed."""
    if report["failures"]:
        one = report["failures"][0]
        print_note(
            f"{plural(len(report['failures']), 'answer')} failed; the first is of question {one['id']} under "
            f"{one['plan']}: {one['error']}"
        )
    if (choice := report["choice"]) is None:
        for name, plan in report["plans"].items():
            for reason in plan["unmet"]:
                print_note(f"{name} does not meet the thresholds: {reason}")
        return
    for name, reason in report["skipped"].items():
        print_note(f"skipped {name}: {reason}")
    for name, reason in choice["rejected"].items():
        if name not in choice["met"]:
            print_note(f"not {name}: {reason}")
    if choice["plan"] is None:
        print_note(f"no plan meets the thresholds on {number(report['answered'])} questions")
    else:
        others = [name for name in choice["met"] if name != choice["plan"]]
        more = f"; {', '.join(others)} meet{'s' * (len(others) == 1)} them too" if others else ""
        print_note(f"chosen: {choice['plan']}, {choice['criterion']}{more}")


def _is_failure(report: Mapping[str, Any]) -> bool:
    if report["choice"] is not None:
        return report["choice"]["plan"] is None or report["answered"] < report["questions"]
    return bool(report["failures"]) or any(plan["unmet"] for plan in report["plans"].values())
