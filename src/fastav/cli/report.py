"""`fastav report`."""

from pathlib import Path
from typing import Annotated

import typer

from fastav.cli import _options
from fastav.cli._json import print_json
from fastav.cli._quiet import working
from fastav.cli.plan import write_atomically


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What fastav calibrate left.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Where the page goes.  [default: DIR/report.html]")
    ] = None,
    as_json: _options.Json = False,
) -> None:
    """Draw what a calibration found as one HTML page that needs nothing else.

    No model is loaded. FILE.html is overwritten.
    """
    path = folder / "report.html" if out is None else out
    with working("drawing"):
        from fastav.report import page

        write_atomically(path, page(folder))
    if as_json:
        print_json({"path": str(path)})
    else:
        print(f"wrote {path}")
