"""`fastav leaderboard`."""

from pathlib import Path
from typing import Annotated

import typer

from fastav.cli import _options, _scores
from fastav.cli._output import print_json, write_file


def leaderboard(
    rows: Annotated[list[Path], typer.Argument(metavar="ROWS", help="Files that fastav eval --out has written.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw score against FLOPs (.svg, .png).")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Write the tables as Markdown.")] = None,
    as_json: _options.Json = False,
) -> None:
    """Compare the plans in files of rows, as tables and as a chart.

    Files of the same model, task, device and data type are merged; other files get tables and a chart panel of their
    own. FILE and FILE.md are overwritten.
    """
    from fastav import evaluate as library

    reports = [library.report(results) for results in library.merge(map(library.read, rows))]
    if out is not None:
        write_file(out, library.chart(reports, out.suffix.removeprefix(".").lower()))
    if markdown is not None:
        write_file(markdown, "\n".join(map(library.markdown, reports)))
    if as_json:
        print_json({"reports": reports})
    else:
        for report in reports:
            _scores.show(report)
