"""`fastav plan show` and `fastav plan write`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastav.cli import _options, _plans, _render
from fastav.cli._help import GroupedCommand, plans
from fastav.cli._json import print_json
from fastav.cli._quiet import hushed, working
from fastav.errors import FastAVError, PlanError
from fastav.files import whole

app = typer.Typer(help="Show a plan, or write one to a file.", rich_markup_mode=None)


@app.command(cls=GroupedCommand)
def show(
    plan: Annotated[
        str,
        typer.Argument(metavar="PLAN", autocompletion=plans, help="A preset of the model, a recipe, or a .json file."),
    ],
    model: _options.Model = "videollama2",
    layers: Annotated[bool, typer.Option("--layers", help="Every layer by itself, not ranges of like ones.")] = False,
    as_json: _options.Json = False,
) -> None:
    """Show a plan's steps and the tokens that every layer keeps.

    The tokens are those of an example prompt of the model; no weights are needed.
    """
    with working(f"reading {plan}"), hushed():
        from fastav import pipelines

        adapter, _, config = pipelines.resolve(model)
        chosen = pipelines.plan_named(plan, adapter)
        _plans.require_sound(chosen, config)
        layout = adapter.example(config, audio=None, video=None, text=_options.TEXT_TOKENS)
        kept = chosen.by_layer(layout, adapter.shape(config).layers)
    report = {
        "plan": json.loads(chosen.to_json()),
        "fingerprint": chosen.fingerprint,
        "model": model,
        "prompt_tokens": layout.by_modality(),
        "tokens_per_layer": kept,
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
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write it.")],
    model: _options.Model = "videollama2",
    drop: _options.Drop = None,
    start: _options.Start = None,
    keep_audio: _options.KeepAudio = None,
    before: _options.Before = None,
    exempt_text: _options.ExemptText = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    as_json: _options.Json = False,
) -> None:
    """Write a plan to a JSON file.

    FastAV's settings are changed as asked; no weights are needed.
    """
    if out.suffix != ".json":
        raise PlanError(f"a plan's file must end in .json, got {str(out)!r}", "--plan reads only those")
    if out.exists() and not force:
        raise PlanError(f"{out} exists", "give --force to overwrite it")
    if out.exists() and not out.is_file():
        raise PlanError(f"{out} is no regular file", "name a file")
    with working(f"reading {name}"), hushed():
        from fastav import pipelines

        adapter, _, config = pipelines.resolve(model)
        chosen = _plans.tuned(
            pipelines.plan_named(name, adapter),
            drop=drop,
            start=start,
            keep_audio=keep_audio,
            before=before,
            exempt_text=exempt_text,
        )
        _plans.require_sound(chosen, config)
    write_atomically(out, chosen.to_json() + "\n")
    report: dict[str, Any] = {"path": str(out), "fingerprint": chosen.fingerprint}
    if as_json:
        print_json(report)
    else:
        print(f"wrote {out} ({chosen.fingerprint})")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or none: what was there before stays until all is on disk.  Raises: FastAVError."""
    try:
        with whole(path) as part:
            part.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise FastAVError(f"cannot write {path.resolve()}: {error.strerror}", "nothing was written") from None
