"""What was measured, as JSON with its circumstances, and as a table."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastav.bench.measure import Spread
from fastav.errors import FastAVError, reason_of
from fastav.files import atomic_write
from fastav.provenance import provenance

FORMAT = 1  # of the JSON

Json = Mapping[str, Any]


def circumstances(
    arguments: Sequence[str], device: torch.device, commit: str | None, program: str = "fastav.bench"
) -> dict[str, Any]:
    """Command, commit, machine, versions and date.  commit: where git cannot tell. program: the module that was run."""
    found = provenance(device)
    command = shlex.join(["python", "-m", program, *arguments])
    return {"command": command, **found, "commit": found["commit"] or commit}


def write(report: Json, path: Path) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """What a file of JSON holds.  Raises: FastAVError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastAVError(f"cannot read {path}: {getattr(error, 'strerror', None) or reason_of(error)}") from None


def read(path: Path) -> dict[str, Any] | None:
    """What `fastav bench --out` wrote; None if the file holds something else.  Raises: FastAVError."""
    report = load_json(path)
    return report if isinstance(report, dict) and report.get("fastav_bench") == FORMAT else None


def heading(report: Json) -> str:
    """What is measured on what, for eyes."""
    gb, rates = report["weight_bytes"] / 1e9, report["rates"]
    machine = report["machine"].get("gpu") or f"{report['machine']['cpu']}, threads: {report['machine']['threads']}"
    lines = [
        f"{report['model']}, {gb:.2f} GB of random weights in {report['dtype']}, on {machine}",
        f"the machine multiplies {rates['tflops']:.4g} TFLOP/s and copies {rates['gb_per_second']:.4g} GB/s",
        *(f"not measured: {name}: {reason}" for name, reason in report["skipped"].items()),
    ]
    return "\n".join([*lines, ""])


def table(part: Json) -> str:
    """A part, for eyes: medians [quartiles]."""
    kinds = " + ".join(f"{n:,} {kind}" for kind, n in part["by_modality"].items())
    lines = [f"{part['model']}, {kinds} = {part['tokens']:,} tokens, batch {part['batch']}"]
    if part["rows"]:
        lines += ["", *_prefills(part["rows"])]
    if any(row["end_to_end"] for row in part["rows"]):
        lines += ["", *_answers(part["rows"])]
    lines += ["", *_others(part), ""]
    return "\n".join([*lines, *_targets(part["rows"]), ""])


def spread(of: Spread, scale: float = 1.0) -> str:
    """Median and quartiles."""
    return f"{scale * of.median:.3f} [{scale * of.low:.3f}-{scale * of.high:.3f}]"


def _prefills(rows: Sequence[Json]) -> Iterator[str]:
    yield _line("prefill", "ms", "of transformers'", "FLOPs", "over limit", "peak MB", "KV MB")
    for row in rows:
        yield _line(
            row["contender"],
            _ms(row["prefill"]),
            _ratio(row["prefill_ratio"]),
            f"{row['flops_ratio']:.3f}",
            _times(row["prefill_over_limit"]),
            _mb(row["prefill_peak_bytes"]),
            _mb(row["kv_bytes"]),
        )


def _answers(rows: Sequence[Json]) -> Iterator[str]:
    yield _line(
        f"{rows[0]['new_tokens']} tokens", "ms a token", "all, ms", "ratio", "over limit", "peak MB", "capture s"
    )
    for row in rows:
        yield _line(
            row["contender"],
            _ms(row["decode"]),
            _ms(row["end_to_end"]),
            _ratio(row["end_to_end_ratio"], short=True),
            _times(row["decode_over_limit"]),
            _mb(row["peak_bytes"]),
            "-" if row["capture"] is None else f"{row['capture']:.2f}",
        )


def _line(name: str, *cells: str) -> str:
    """Of 100 columns."""
    widths = (22, 22, 8, 11, 9, 10)
    return f"{name:<18.18}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _others(part: Json) -> Iterator[str]:
    """The encoders, cuts, waits, and who is out."""
    if part["encode"]:
        yield f"encoders: {_ms(part['encode'])} ms"
    for row in part["rows"]:
        if cut := row["cut"]:
            parts = ", ".join(f"{name} {1000 * cut[name]['median']:.3f}" for name in ("score", "select", "gather"))
            yield f"cuts of {row['contender']}: {parts} ms, {100 * cut['share']:.2f} % of its prefill"
        if row["compile"] is not None:
            yield f"{row['contender']}: compiling took {row['compile']:.1f} s"
        if row["waits"]:
            yield f"{row['contender']} waits for the device: {row['waits']}"
    for name, reason in part["failed"].items():
        yield f"{name}: {reason}"


def _targets(rows: Sequence[Json]) -> Iterator[str]:
    """A line for each target that was judged; then those that were not, once each."""
    unknown = {}
    for row in rows:
        for target in row["targets"]:
            if target["verdict"] == "not measured":
                unknown[target["name"]] = f"at most {target['at_most']:g} on {target['where']}"
            else:
                told = f"{target['name']}: {target['value']:.3f}, at most {target['at_most']:g}"
                yield f"{target['verdict']:<7}{row['contender']}: {told}"
    yield from (f"not measured: {name}, {aim}" for name, aim in unknown.items())


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def _ms(of: Json | None, *, short: bool = False) -> str:
    if of is None:
        return "-"
    low, median, high = (f"{1000 * of[key]:.4g}" for key in ("low", "median", "high"))
    return median if short else f"{median} [{low}-{high}]"


def _ratio(of: Json | None, *, short: bool = False) -> str:
    if of is None:
        return "-"
    return f"{of['median']:.3f}" if short else f"{of['median']:.3f} [{of['low']:.3f}-{of['high']:.3f}]"


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"
