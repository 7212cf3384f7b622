"""Files of rows that a command writes as it runs, so that it can continue."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastav.cli._progress import progress, suppress_warnings
from fastav.cli._text import print_note
from fastav.cli._types import RowFile
from fastav.formatting import plural


@contextmanager
def rows_path(out: Path | None) -> Iterator[Path]:
    """The path for rows: `out`, or a temporary file."""
    if out is not None:
        yield out
    else:
        with TemporaryDirectory() as folder:
            yield Path(folder, "rows.jsonl")


def write_rows(rows: Iterator[Any], file: RowFile, *, title: str, remaining: int, noun: str, out: Path | None) -> None:
    """Write rows as they come, with a progress bar on a terminal. After Ctrl-C, print how to continue.

    remaining: the number of rows that are missing. noun: what a row is.
    """
    if file.rows:
        print_note(f"{out} has {plural(len(file.rows), noun)}; {remaining:,} missing")
    try:
        with progress(title, remaining) as step, suppress_warnings():
            for row in rows:
                file.append(row)
                step()
    except KeyboardInterrupt:
        are = "is" if len(file.rows) == 1 else "are"
        after = f"in {out}; run the same command again to continue" if out else "lost; --out FILE stores them"
        print_note(f"\n{plural(len(file.rows), noun)} {are} {after}")
        raise
