"""`fastav serve`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastav.cli import _options
from fastav.cli._progress import suppress_warnings
from fastav.cli._text import stderr
from fastav.errors import InstallationError, install_hint
from fastav.formatting import plural

ACCESS, LIMITS = "Access", "Limits"  # headings in the help
KEY = "FASTAV_API_KEY"


def serve(
    model: _options.ModelName = "tiny-long",
    plan: _options.PlanName = "fastav",
    host: Annotated[
        str, typer.Option(help="Address to bind. Others than this machine's need --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 for any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients.  [default: MODEL]")] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Most answers that run together.")] = 8,
    queue: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most answers that clients wait for; beyond: 429.")
    ] = 64,
    decoders: Annotated[int, typer.Option(min=1, max=64, metavar="N", help="Processes that decode media.")] = 2,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=ACCESS,
            metavar="KEY",
            help=f"Key that clients must send; can be repeated. Better in the variable {KEY}.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=ACCESS, metavar="NAME", help="Name under which clients reach this server."),
    ] = None,
    media_root: Annotated[
        Path | None,
        typer.Option(rich_help_panel=ACCESS, metavar="DIR", help="Allow file:// URLs of files below this folder."),
    ] = None,
    allow_domains: Annotated[
        str | None,
        typer.Option(rich_help_panel=ACCESS, metavar="A,B,...", help="Allow http(s) URLs of media on these hosts."),
    ] = None,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Let these hosts have private addresses.", rich_help_panel=ACCESS)
    ] = False,
    max_body_mb: Annotated[
        int, typer.Option(min=1, metavar="N", help="Megabytes of a request or upload.", rich_help_panel=LIMITS)
    ] = 64,
    max_media_seconds: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Seconds of all media of a request.", rich_help_panel=LIMITS)
    ] = 3600,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of an answer.", rich_help_panel=LIMITS)
    ] = 4096,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="S", help="Seconds of a request.", rich_help_panel=LIMITS)
    ] = 300,
    device: _options.Device = None,
    dtype: _options.DtypeOrAuto = None,
) -> None:
    """Serve a model, pruned, with OpenAI's API and a page that shows what was kept.

    The page is at the server's address, which goes to stderr; the API below /v1. A request can name its own plan. The
    server is reached from this machine alone unless --host says otherwise. Ctrl-C ends it; answers that run are
    finished. For many clients of a large model, use vLLM with the same plans (fastav serve-config). See docs/serve.md.
    """
    keys = [*(api_key or ()), *filter(None, [os.environ.get(KEY)])]
    try:
        from fastav.serve.server import ServerOptions
        from fastav.serve.server import serve as run
    except ImportError as error:
        raise InstallationError(
            f"the server needs {error.name}, which is not installed", install_hint("serve")
        ) from None
    from fastav.cli.run import load_pipeline, out_of_memory_as_error
    from fastav.serve.limits import Limits

    options = ServerOptions(
        host=host,
        port=port,
        name=name or model,
        keys=keys,
        hosts=allow_host or (),
        root=media_root,
        domains=None if allow_domains is None else frozenset(filter(None, allow_domains.lower().split(","))),
        private=allow_private,
        batch=batch,
        decoders=decoders,
        limits=Limits(
            body_bytes=max_body_mb * 1_000_000,
            media_seconds=max_media_seconds,
            new_tokens=max_new_tokens,
            request_seconds=timeout,
            queue=queue,
        ),
    )
    pipe = load_pipeline(model, [plan], device, dtype, "transformers")

    def tell(url: str) -> None:
        stderr().print(f"fastav serves {options.name} with the plan {plan} at {url} (API: {url}/v1)", soft_wrap=True)
        sys.stderr.flush()

    def tell_end(answers: int) -> None:
        rest = f"finishing {plural(answers, 'answer')}; Ctrl-C again ends at once" if answers else "ending"
        print(f"\n{rest}", file=sys.stderr, flush=True)

    with pipe, suppress_warnings(), out_of_memory_as_error():
        run(pipe, options, on_ready=tell, on_stopping=tell_end)
