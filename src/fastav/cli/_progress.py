"""Spinners, progress bars and warnings of the commands."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fastav.cli._text import printable, stderr
from fastav.cli._types import Status


@contextmanager
def spinner(text: str) -> Iterator[Status | None]:
    """Show a spinner on stderr if that is a terminal."""
    with stderr().status(Text(text)) if sys.stderr.isatty() else nullcontext() as status:
        yield status


@contextmanager
def progress(text: str, steps: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr if that is a terminal. Call the yielded function after every step."""
    counts = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    columns = SpinnerColumn(), TextColumn("{task.description}"), *counts
    with Progress(*columns, console=stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(text, total=steps)
        yield lambda: bar.advance(task)


@contextmanager
def suppress_warnings(*, downloads: bool = False) -> Iterator[None]:
    """Hide warnings and progress bars of transformers; fastav's own warnings print as one line each.

    downloads: show the hub's progress bars on a terminal.
    """
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    levels, bars = (logging.get_verbosity(), hub.get_verbosity()), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    logging.disable_progress_bar()
    if downloads and sys.stderr.isatty():
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show
            yield
    finally:
        logging.set_verbosity(levels[0])
        hub.set_verbosity(levels[1])
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def _show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Print a warning of fastav; warnings of other libraries are meant for their developers."""
    if category.__module__.startswith("fastav."):
        line = Text.assemble(("warning: ", "bold yellow"), printable(" ".join(str(message).split())))
        stderr().print(line, soft_wrap=True)
