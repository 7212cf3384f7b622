"""`python -m fastav.bench`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastav.errors import FastAVError


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write `DIR/bench-<shape>-<device>.json` if asked."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(arguments)
    try:
        _run(options, arguments)
    except ModuleNotFoundError as error:
        print(f"fastav.bench needs the package {error.name!r}, which is not installed", file=sys.stderr)
        return 2
    except FastAVError as error:
        print(f"fastav.bench: {error}", file=sys.stderr)
        return 2
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastav.bench", description=__doc__)
    add = parser.add_argument
    add("--shape", choices=("tiny", "small", "videollama2"), default="small", help="default: small")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--tokens", type=int, help="length of the prompt; shape small only (default 4096)")
    add("--repeats", type=int, help="rounds of prefills; of answers, a third (default: 5 on a CPU, 12 on a GPU)")
    add("--new-tokens", type=int, help="tokens to decode; 0 for none (default: 0 on a CPU, 32 on a GPU)")
    add("--threads", type=int, default=1, help="of a CPU (default: 1)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--out", type=Path, help="folder for the JSON")
    add("--json", action="store_true", help="print the JSON instead of tables")
    add("--commit", help="what to call the commit where git cannot tell")
    options = parser.parse_args(arguments)
    if options.tokens is not None and (options.shape != "small" or options.tokens < 256):
        parser.error("--tokens goes with --shape small, from 256 on")
    gpu = options.device == "cuda"
    for name, default in (("repeats", 12 if gpu else 5), ("new_tokens", 32 if gpu else 0)):
        if getattr(options, name) is None:
            setattr(options, name, default)
        if getattr(options, name) < (1 if name == "repeats" else 0):
            parser.error(f"--{name.replace('_', '-')} must not be less")
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    return options


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    import torch  # here, so that --help is quick and a missing package is told in one line

    from fastav.bench import probes, report, suite, workload

    if options.device == "cuda" and not torch.cuda.is_available():
        raise FastAVError("this torch sees no CUDA device", "leave --device out to measure on the CPU")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    shape = workload.SHAPES[options.shape]
    if options.tokens is not None:
        shape = replace(shape, media=options.tokens - shape.text)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        result = report.circumstances(arguments, device, options.commit)
        result |= {"context": probes.context(device, dtype), "skipped": suite.attentions(device)[1]}
        parts = []
        for part in suite.suite(shape, device, dtype, options.repeats, options.new_tokens):
            parts.append(part)
            result |= report.as_json(parts)
            if options.out:  # after every part: what was measured survives what comes next
                report.write(result, options.out / f"bench-{shape.name}-{device.type}.json")
            if not options.json:
                print(report.table(part), flush=True)
        if options.json:
            print(json.dumps(result, indent=2))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
