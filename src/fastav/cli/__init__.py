"""The command line. Commands import torch, transformers and numpy themselves, so that `--help` is fast."""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from fastav import __version__
from fastav.cli import (
    ablate,
    batch,
    bench,
    calibrate,
    evaluate,
    flops,
    leaderboard,
    methods,
    models,
    plan,
    recipes,
    report,
    run,
    serve,
    serve_config,
    verify,
)
from fastav.cli._help import GroupedCommand, GroupedCommands
from fastav.cli._text import print_error
from fastav.errors import FastAVError, reason_of
from fastav.installation import importable

# typer bundles click or depends on it, by version; this is the base class of usage errors in both cases
if TYPE_CHECKING:
    UsageError = typer.BadParameter
else:
    UsageError = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="fastav",
    help="Training-free token pruning inside audio-visual LLMs.",
    cls=GroupedCommands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
COMMANDS = {
    "Answer questions": {"run": run.run, "batch": batch.batch},
    "Plans and their costs": {
        "flops": flops.flops,
        "plan": plan.app,
        "models": models.models,
        "methods": methods.methods,
        "recipes": recipes.recipes,
    },
    "Compare and measure": {
        "verify": verify.verify,
        "eval": evaluate.evaluate,
        "ablate": ablate.ablate,
        "leaderboard": leaderboard.leaderboard,
        "bench": bench.bench,
    },
    "Derive a plan from your own clips": {"calibrate": calibrate.calibrate, "report": report.report},
    "Serve": {"serve": serve.serve, "serve-config": serve_config.serve_config},
}
for heading, commands in COMMANDS.items():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=heading)
        else:
            app.command(name, cls=GroupedCommand, rich_help_panel=heading)(command)


def _print_version(requested: bool) -> bool:
    if requested:
        print(f"fastav {__version__}")
        raise typer.Exit
    return requested


@app.callback()
def fastav(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Training-free token pruning inside audio-visual LLMs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 for user errors, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # a character that the terminal cannot show must not end the command
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        with importable():
            code = app(arguments or ["--help"], prog_name="fastav", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk fails here rather than at the interpreter's exit
    except FastAVError as error:
        return print_error(error.message, error.hint)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "fastav"
        return print_error(error.format_message(), f"{command} --help")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except OSError as error:
        _abandon_stdout()
        if isinstance(error, BrokenPipeError):
            return 1
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return print_error(_reason(error), "free some disk space, then run the command again" if full else "")
    if code == 130:
        print("\ninterrupted", file=sys.stderr)
    return code or 0


def _reason(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror or reason_of(error)


def _abandon_stdout() -> None:
    """Redirect stdout to the null device, so that the interpreter's last flush does not fail again."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
