"""`fastav bench`, which is also `python -m fastav.bench`."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fastav.cli import _help, _options
from fastav.cli._output import print_json
from fastav.cli._progress import suppress_warnings
from fastav.cli._text import stderr
from fastav.cli.evaluate import split_commas
from fastav.errors import FastAVError

Number = TypeVar("Number", int, float)
MAX_TOKENS, MAX_BATCH, MAX_SECONDS = 1_000_000, 4096, 86_400


def _models(incomplete: str) -> list[str]:
    """Names of models that begin with this text, for a shell's completion."""
    return [name for name in ("small",) if name.startswith(incomplete)] + _help.models(incomplete)


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", autocompletion=_models, help="small, a name (fastav models), a local folder, or a hub id."
        ),
    ] = "small",
    plan: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B,...", help="Presets, recipes, .json files.  [default: fastav,fastv,pyramiddrop]"),
    ] = None,
    batch: Annotated[list[str], typer.Option(metavar="N,...", help="Batch sizes.")] = ["1"],  # noqa: B006
    tokens: Annotated[list[str] | None, typer.Option(metavar="N,...", help="Lengths of prompts in tokens.")] = None,
    seconds: Annotated[
        list[str] | None, typer.Option(metavar="S,...", help="Lengths of 720p clips to ask about, in seconds.")
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Tokens of an answer; 0: prefill only.  [default: 32 on a GPU, else 0]"),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Rounds of prefills; of answers half.  [default: 12 on a GPU, else 5]"),
    ] = None,
    device: _options.Device = None,
    dtype: _options.Dtype = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B,...", help="sdpa, eager, flash_attention_2 or _3; our engine is measured with the first."
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also measure our engine with norms and MLPs under torch.compile.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, max=1024, metavar="N", help="CPU threads.")] = 1,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the JSON report, written after every part.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw prefill time against tokens.")] = None,
    commit: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the commit, where git cannot tell.")
    ] = None,
    as_json: _options.Json = False,
) -> None:
    """Measure how fast a model prefills and answers, unpruned and pruned by plans.

    The model is built from its configuration, with random weights of the real shape; prompts have random content. In
    every round transformers' own generate, our engine unpruned and every plan run once, and ratios are taken within the
    round. The default prompt is typical of the model. small is a decoder that one CPU core prefills in seconds.
    docs/speed.md defines what is measured; --rounds, --tokens and --batch set how long it takes.
    """
    arguments = _command_line(locals())
    if plot is not None:
        from fastav.bench.plot import require_matplotlib

        require_matplotlib()
    options = {
        "plans": split_commas(plan or []),
        "batches": _numbers("batch", batch, int, MAX_BATCH) or [1],
        "tokens": _numbers("tokens", tokens, int, MAX_TOKENS),
        "seconds": _numbers("seconds", seconds, float, MAX_SECONDS),
        "attentions": split_commas(attention or []),
    }
    for folder in (out, plot and plot.parent):
        _make_folder(folder)
    with _status() as show, suppress_warnings():
        show("reading the configuration")
        from fastav.bench.session import Session

        session = Session.of(
            model,
            **options,
            new_tokens=new_tokens,
            rounds=rounds,
            device=device,
            dtype=dtype,
            compiled=compiled,
            threads=threads,
            commit=commit,
            arguments=arguments,
        )
        report = session.run(out, output=None if as_json else lambda text: print(text, flush=True), progress=show)
    if as_json:
        print_json(report)
    if plot is not None:
        from fastav.bench.plot import draw

        draw([report], plot)


def _make_folder(folder: Path | None) -> None:
    """Make a folder before anything is measured for it.  Raises: FastAVError."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise FastAVError(f"cannot write into {str(folder)!r}: {reason}", "give another folder") from None


def _command_line(values: Mapping[str, Any]) -> list[str]:
    """The arguments of `bench` that differ from their defaults, as a shell takes them."""
    words = []
    for name, parameter in signature(bench).parameters.items():
        value = values[name]
        if name == "model":
            words.append(value)
        elif value == parameter.default:
            continue
        elif value is True:
            words.append(f"--{name.removeprefix('as_')}")
        else:
            each = value if isinstance(value, list) else [value]
            words += [word for one in each for word in (f"--{name.replace('_', '-')}", str(one))]
    return words


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A line that shows the current step, on a terminal only; a spinner would take CPU time from what is measured."""
    from rich.live import Live
    from rich.text import Text

    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with Live(console=stderr(), auto_refresh=False, transient=True) as live:
        yield lambda text: live.update(Text(f"{text} ..."), refresh=True)


def _numbers(name: str, values: Sequence[str] | None, kind: Callable[[str], Number], most: int) -> list[Number]:
    """The positive numbers of an option, without repeats.  Raises: FastAVError."""
    numbers = []
    for text in split_commas(values or []):
        try:
            number = kind(text)
        except ValueError:
            number = kind("0")
        if not 0 < number <= most:
            what = "a whole number" if kind is int else "a number"
            raise FastAVError(f"--{name} must be {what} above 0, {most:,} at most, got {text!r}")
        numbers.append(number)
    return list(dict.fromkeys(numbers))
