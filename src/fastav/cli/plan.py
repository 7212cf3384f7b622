"""`fastav plan show` and `fastav plan write`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastav.cli import _options, _plans, _render
from fastav.cli._help import GroupedCommand, plans
from fastav.cli._output import print_json, write_file
from fastav.cli._progress import spinner, suppress_warnings
from fastav.errors import PlanError

app = typer.Typer(help="Show a plan, or write it to a file.", rich_markup_mode=None)


@app.command(cls=GroupedCommand)
def show(
    plan: Annotated[
        str,
        typer.Argument(metavar="PLAN", autocompletion=plans, help="A preset of the model, a recipe, or a .json file."),
    ],
    model: _options.Model = "videollama2",
    retention: _options.Retention = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print every layer on its own line.")] = False,
    as_json: _options.Json = False,
) -> None:
    """Show the steps of a plan and the tokens of every layer.

    The tokens are those of an example prompt of the model. No weights are needed.
    """
    with spinner(f"reading {plan}"), suppress_warnings():
        from fastav import pipelines
        from fastav.retention import mean_retention

        adapter, _, config = pipelines.resolve(model)
        resolved = pipelines.plan_named(_plans.aimed(plan, retention), adapter)
        _plans.check_runnable(resolved, config, adapter)
        layout = adapter.example(config, audio=None, video=None, text=_options.TEXT_TOKENS)
        shape = adapter.shape(config)
        tokens, prompt = resolved.for_decoder(shape).by_layer(layout, shape.layers), layout.by_modality()
    report = {
        "plan": json.loads(resolved.to_json()),
        "fingerprint": resolved.fingerprint,
        "model": model,
        "prompt_tokens": prompt,
        "tokens_per_layer": tokens,
        "mean_retention": mean_retention(tokens, prompt),
    }
    if as_json:
        print_json(report)
    else:
        _render.plan(report, every_layer=layers)


@app.command(cls=GroupedCommand)
def write(
    name: Annotated[
        str,
        typer.Argument(metavar="PLAN", autocompletion=plans, help="A preset of the model, a recipe, or a .json file."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File for the plan.")],
    model: _options.Model = "videollama2",
    retention: _options.Retention = None,
    drop: _options.Drop = None,
    start: _options.Start = None,
    keep_audio: _options.KeepAudio = None,
    before: _options.Before = None,
    exempt_text: _options.ExemptText = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    as_json: _options.Json = False,
) -> None:
    """Write a plan to a JSON file.

    Options under FastAV settings change the plan first. No weights are needed.
    """
    if out.suffix != ".json":
        raise PlanError(f"the file of a plan must end in .json, got {str(out)!r}", "--plan reads only those")
    if out.exists() and not force:
        raise PlanError(f"{out} exists", "use --force to overwrite it")
    if out.exists() and not out.is_file():
        raise PlanError(f"{out} is not a regular file", "give the path of a file")
    with spinner(f"reading {name}"), suppress_warnings():
        from fastav import pipelines

        adapter, _, config = pipelines.resolve(model)
        resolved = _plans.tune(
            pipelines.plan_named(_plans.aimed(name, retention), adapter),
            drop=drop,
            start=start,
            keep_audio=keep_audio,
            before=before,
            exempt_text=exempt_text,
        )
        _plans.check_runnable(resolved, config, adapter)
    write_file(out, resolved.to_json() + "\n")
    report: dict[str, Any] = {"path": str(out), "fingerprint": resolved.fingerprint}
    if as_json:
        print_json(report)
    else:
        print(f"wrote {out} ({resolved.fingerprint})")
