"""Console output: streams, error messages and number formats."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from fastav.formatting import plural

WIDTH = 110  # columns that are used at most
MODALITIES = ("video", "audio", "image", "clip", "media", "text", "all")  # and what shares a budget, in display order


def stdout() -> Console:
    """The console for results."""
    return Console(highlight=False, markup=False, emoji=False)


def width() -> int:
    """The number of columns to use on the terminal."""
    return min(WIDTH, stdout().width)


def stderr() -> Console:
    """The console for everything but results."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_error(message: str, hint: str = "") -> int:
    """Print an error on one line and its hint on another; return the exit code."""
    for style, label, text in (("bold red", "error", message), ("bold", "hint", hint)):
        if text:
            line = Text.assemble((f"{label}: ", style), printable(" ".join(text.split())))
            stderr().print(line, soft_wrap=True)
    return 2


def print_note(text: str) -> None:
    """Print a line to stderr, if the process has one."""
    if sys.stderr is not None:
        stderr().print(printable(text), soft_wrap=True)


def printable(text: str) -> str:
    """The text without characters that could control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def number(n: int) -> str:
    """`2,216`."""
    return f"{n:,}"


def scaled(n: int, unit: str = "") -> str:
    """`35.2 T`: three digits and a power of 1,000."""
    value, power = float(n), 0
    while value >= 999.5:
        value, power = value / 1000, power + 1
    return f"{_three_digits(value)} {' kMGTPE'[power].strip()}{unit}".rstrip()


def size(n: int | None) -> str:
    """`121 MiB`."""
    if n is None:
        return "unknown"
    value = float(n)
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{_three_digits(value)} {unit}"
        value /= 1024
    return f"{_three_digits(value)} GiB"


def duration(seconds: float) -> str:
    """`815 ms` or `1.85 s`."""
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{_three_digits(seconds)} s"


def percent(ratio: float) -> str:
    """`53.6 %`."""
    return f"{100 * ratio:.1f} %"


def prompt(tokens: Mapping[str, int]) -> str:
    """`676 video + 1,496 audio + 44 text = 2,216 tokens`."""
    parts = " + ".join(f"{number(tokens[modality])} {modality}" for modality in MODALITIES if modality in tokens)
    return f"{parts} = {plural(sum(tokens.values()), 'token')}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 or value == int(value) else f"{value:.{1 if value >= 9.995 else 2}f}"
