"""`fastav bench`, which is also `python -m fastav.bench`. torch is imported inside, for a quick `--help`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from fastav.errors import FastAVError

Number = TypeVar("Number", int, float)
MOST_TOKENS, MOST_BATCH, MOST_SECONDS = 1_000_000, 4096, 86_400


def _models(incomplete: str) -> list[str]:
    """What a shell completes: names of models that begin so."""
    from fastav.registry import MODELS

    return [name for name in ("small", *MODELS) if name.startswith(incomplete)]


Lengths = Annotated[list[str] | None, typer.Option(metavar="N,...", help="Prompts of so many tokens.")]
Seconds = Annotated[list[str] | None, typer.Option(metavar="S,...", help="Prompts about 720p clips of such lengths.")]
Plans = Annotated[
    list[str] | None,
    typer.Option(metavar="A,B,...", help="Presets, recipes, .json files.  [default: fastav,fastv,pyramiddrop]"),
]
Attentions = Annotated[
    list[str] | None,
    typer.Option(metavar="A,B,...", help="sdpa, eager, flash_attention_2 or _3; ours takes the first."),
]


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=_models,
            help="small, a name (fastav models), a local folder, or a hub id.",
        ),
    ] = "small",
    plan: Plans = None,
    batch: Annotated[list[str], typer.Option(metavar="N,...", help="Batch sizes.")] = ["1"],  # noqa: B006
    tokens: Lengths = None,
    seconds: Seconds = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Of an answer.  [default: 32 on a GPU, 0 on a CPU: none]")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of prefills; of answers half.  [default: GPU 12, CPU 5]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...  [default: cuda where there is one]")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights.  [default: bfloat16 on cuda, float32 on cpu]"),
    ] = None,
    attention: Attentions = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also ours with norms and MLPs under torch.compile.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, max=1024, metavar="N", help="Of a CPU.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the JSON goes, after every part.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw prefill time against tokens.")] = None,
    commit: Annotated[str | None, typer.Option(metavar="NAME", help="What to call it where git cannot tell.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Measure how fast a model prefills and answers, unpruned and by plans.

    From the configuration alone, with random weights of the real shape and prompts of random content. By turns, round
    after round: transformers' own generate, our engine unpruned, and every plan; ratios are taken within a round. The
    default prompt is an example of the model. small is a decoder that one CPU core prefills in seconds. docs/speed.md
    says what is measured; --rounds, --tokens and --batch say how long it takes.
    """
    given = _given(locals())
    from fastav.bench.absent import do_without_av

    do_without_av()
    lengths = _numbers("tokens", tokens, int, MOST_TOKENS)
    clips = _numbers("seconds", seconds, float, MOST_SECONDS)
    batches = _numbers("batch", batch, int, MOST_BATCH)
    if plot is not None:
        from fastav.bench.plot import require_matplotlib

        require_matplotlib()
    for folder in (out, plot and plot.parent):
        _make(folder)
    with _progress() as progress, _quietly():
        progress("reading the configuration")
        from fastav.bench import session

        measured = session.Session.of(
            model,
            plans=_listed(plan),
            batches=batches or [1],
            tokens=lengths,
            seconds=clips,
            new_tokens=new_tokens,
            rounds=rounds,
            device=device,
            dtype=dtype,
            attentions=_listed(attention),
            compiled=compiled,
            threads=threads,
            commit=commit,
            arguments=given,
        )
    with _progress() as progress, _quietly():
        say = None if as_json else lambda text: print(text, flush=True)
        report = measured.run(out, say=say, progress=progress)
    if as_json:
        print(json.dumps({"schema_version": report["fastav_bench"], **report}, indent=2))
    if plot is not None:
        from fastav.bench.plot import draw

        draw([report], plot)


def _make(folder: Path | None) -> None:
    """Make a folder, before anything is measured for it.  Raises: FastAVError."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastAVError(f"cannot write into {str(folder)!r}: {error.strerror or error}", "name a folder") from None


def _given(values: Mapping[str, Any]) -> list[str]:
    """The arguments of `bench` that are not as they are by themselves, as a shell takes them."""
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
def _progress() -> Iterator[Callable[[str], None]]:
    """Show what is being done, on a terminal only, and only when it changes: a spinner would take time of its own."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        yield lambda _: None
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda text: live.update(Text(f"{text} ..."), refresh=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what transformers warns of off the screen: configurations without checkpoints, long prompts."""
    import warnings

    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _listed(values: Sequence[str] | None) -> list[str]:
    """The parts of values that may hold several, separated by commas."""
    return [part for value in values or () for part in map(str.strip, value.split(",")) if part]


def _numbers(name: str, values: Sequence[str] | None, kind: Callable[[str], Number], most: int) -> list[Number]:
    """Positive numbers.  Raises: FastAVError."""
    found = []
    for text in _listed(values):
        try:
            number = kind(text)
        except ValueError:
            number = kind("0")
        if not 0 < number <= most:
            what = "a whole number" if kind is int else "a number"
            raise FastAVError(f"--{name} must be {what} above 0, {most:,} at most, got {text!r}")
        found.append(number)
    return list(dict.fromkeys(found))
