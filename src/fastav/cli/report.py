"""`fastav report`."""

from pathlib import Path
from typing import Annotated

import typer

from fastav.cli import _options
from fastav.cli._output import print_json, write_file
from fastav.cli._progress import spinner


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of fastav calibrate.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="File for the page.  [default: DIR/report.html]")
    ] = None,
    as_json: _options.Json = False,
) -> None:
    """Write the report of a calibration as one self-contained HTML page.

    No model is loaded. FILE.html is overwritten.
    """
    path = folder / "report.html" if out is None else out
    with spinner("drawing"):
        from fastav.report import page

        write_file(path, page(folder))
    if as_json:
        print_json({"path": str(path)})
    else:
        print(f"wrote {path}")
