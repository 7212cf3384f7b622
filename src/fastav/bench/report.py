"""Reports of benchmarks: JSON with the circumstances of the measurement, and tables for a terminal."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastav.errors import FastAVError, reason_of
from fastav.files import atomic_write
from fastav.provenance import provenance

FORMAT = 1  # version of the JSON
WIDTHS = (19, 20, 6, 11, 9, 9, 10)  # of columns; with 16 for names, 100 in all

Json = Mapping[str, Any]


def circumstances(
    arguments: Sequence[str], device: torch.device, commit: str | None, program: str = "fastav.bench"
) -> dict[str, Any]:
    """Command, commit, machine, versions and date.  commit: used where git cannot tell. program: name of the module."""
    facts = provenance(device)
    command = shlex.join(["python", "-m", program, *arguments])
    return {"command": command, **facts, "commit": facts["commit"] or commit}


def write(report: Json, path: Path) -> None:
    """Write the whole report, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read(path: Path, key: str = "fastav_bench") -> dict[str, Any] | None:
    """The report in a file; None if the file holds something else.

    key: where reports of this kind have their format.
    Raises: FastAVError if the file is not JSON.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastAVError(f"cannot read {path}: {getattr(error, 'strerror', None) or reason_of(error)}") from None
    return report if isinstance(report, dict) and report.get(key) == FORMAT else None


def cell(quartiles: Json | None, spec: str = ".3f", *, scale: int = 1, brief: bool = False) -> str:
    """`0.534 [0.530-0.541]`, or `0.534` if brief; `-` for None."""
    if quartiles is None:
        return "-"
    low, median, high = (format(scale * quartiles.get(key, 0.0), spec) for key in ("low", "median", "high"))
    return median if brief else f"{median} [{low}-{high}]"


def milliseconds(quartiles: Json | None, *, brief: bool = False) -> str:
    """`12.34 [12.1-12.6]` for seconds."""
    return cell(quartiles, ".4g", scale=1000, brief=brief)


def share(value: float | None) -> str:
    """`0.534`."""
    return "-" if value is None else f"{value:.3f}"


def times(value: float | None) -> str:
    """`1.23 x`."""
    return "-" if value is None else f"{value:.2f} x"


def megabytes(size: int | None, spec: str = ".1f") -> str:
    """`12.3`, without a unit."""
    return "-" if size is None else format(size / 1e6, spec)


def modalities(counts: Mapping[str, int]) -> str:
    """`44 text + 1,496 audio = 1,540`."""
    return f"{' + '.join(f'{n:,} {kind}' for kind, n in counts.items())} = {sum(counts.values()):,}"


def machine(report: Json) -> str:
    """The GPU, or the CPU and its threads."""
    facts = report["machine"]
    return facts.get("gpu") or f"{facts['cpu']}, threads: {facts['threads']}"


def heading(report: Json) -> str:
    """The model and the machine, for a terminal."""
    rates = report["rates"]
    lines = [
        f"{report['model']}, {report['weight_bytes'] / 1e9:.2f} GB of random weights in {report['dtype']}, "
        f"on {machine(report)}",
        f"the machine multiplies {rates['tflops']:.4g} TFLOP/s and copies {rates['gb_per_second']:.4g} GB/s",
        *(f"not measured: {name}: {reason}" for name, reason in report["skipped"].items()),
    ]
    return "\n".join([*lines, ""])


def table(part: Json) -> str:
    """A part, for a terminal: medians [quartiles]."""
    rows = part["rows"]
    lines = [f"{part['model']}, {modalities(part['by_modality'])} tokens, batch {part['batch']}"]
    if rows:
        head = ("ms", "of transformers'", "FLOPs", "over limit", "peak MB", "KV MB", "retention")
        lines += ["", _line("prefill", *head)]
        lines += map(_prefill, rows)
    if any(row["end_to_end"] for row in rows):
        head = ("ms a token", "all, ms", "ratio", "over limit", "peak MB", "graph s")
        lines += ["", _line(f"{rows[0]['new_tokens']} tokens", *head), *map(_answer, rows)]
    return "\n".join([*lines, "", *_notes(part), "", *_verdicts(rows), ""])


def _prefill(row: Json) -> str:
    return _line(
        row["contender"],
        milliseconds(row["prefill"]),
        cell(row["prefill_ratio"]),
        share(row["flops_ratio"]),
        times(row["prefill_over_limit"]),
        megabytes(row["prefill_peak_bytes"]),
        megabytes(row["kv_bytes"]),
        share(row["mean_retention"]),
    )


def _answer(row: Json) -> str:
    return _line(
        row["contender"],
        milliseconds(row["decode"]),
        milliseconds(row["end_to_end"]),
        cell(row["end_to_end_ratio"], brief=True),
        times(row["decode_over_limit"]),
        megabytes(row["peak_bytes"]),
        "-" if row["capture"] is None else f"{row['capture']:.2f}",
    )


def _line(name: str, *cells: str) -> str:
    return f"{name:<16.16}" + "".join(f"{text:>{width}}" for text, width in zip(cells, WIDTHS, strict=False))


def _notes(part: Json) -> Iterator[str]:
    """Encoders, cuts, compilation, waits, and contenders that failed."""
    if part["encode"]:
        yield f"encoders: {milliseconds(part['encode'])} ms"
    for row in part["rows"]:
        name = row["contender"]
        if cut := row["cut"]:
            parts = ", ".join(f"{what} {1000 * cut[what]['median']:.3f}" for what in ("score", "select", "gather"))
            yield f"cuts of {name}: {parts} ms, {100 * cut['share']:.2f} % of its prefill"
        if row["compile"] is not None:
            yield f"{name}: compiling took {row['compile']:.1f} s"
        if row["waits"]:
            yield f"{name} waits for the device: {row['waits']}"
    yield from (f"{name}: {reason}" for name, reason in part["failed"].items())


def _verdicts(rows: Sequence[Json]) -> Iterator[str]:
    """A line for each target that was measured; then the other targets, once each."""
    unknown = {}
    for row in rows:
        for target in row["targets"]:
            if target["verdict"] == "not measured":
                unknown[target["name"]] = f"at most {target['at_most']:g} on {target['where']}"
            else:
                value = f"{target['value']:.3f}, at most {target['at_most']:g}"
                yield f"{target['verdict']:<7}{row['contender']}: {target['name']}: {value}"
    yield from (f"not measured: {name}, {aim}" for name, aim in unknown.items())
