"""Spinners, progress bars and warnings of the commands."""

import signal
import sys
import threading
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
    """Show a progress bar on stderr if that is a terminal. Call the yielded function after every step.

    The function raises KeyboardInterrupt if a Ctrl-C was lost during the step.
    """
    counts = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    columns = SpinnerColumn(), TextColumn("{task.description}"), *counts
    bar = Progress(*columns, console=stderr(), transient=True, disable=not sys.stderr.isatty())
    with bar, _keep_interrupts() as check:
        task = bar.add_task(text, total=steps)

        def step() -> None:
            bar.advance(task)
            check()

        yield step


@contextmanager
def _keep_interrupts() -> Iterator[Callable[[], None]]:
    """Keep a Ctrl-C that is lost; the yielded function raises KeyboardInterrupt if there was one.

    A signal that arrives while PyAV builds an exception of its own raises a KeyboardInterrupt that PyAV discards.
    """
    interrupted = False

    def handle(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if not (is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield check
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield check
    except Exception:
        check()  # the step failed after the signal
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
