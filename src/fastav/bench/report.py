"""What was measured, as JSON with its circumstances, and as a table."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastav.bench.measure import Row, Spread
from fastav.bench.probes import CutCost
from fastav.bench.suite import Part
from fastav.files import whole
from fastav.provenance import provenance


def circumstances(arguments: Sequence[str], device: torch.device, commit: str | None) -> dict[str, Any]:
    """Command, commit, machine, versions and date.  commit: where git cannot tell."""
    found = provenance(device)
    command = shlex.join(["python", "-m", "fastav.bench", *arguments])
    return {"command": command, **found, "commit": found["commit"] or commit}


def as_json(parts: Sequence[Part]) -> dict[str, Any]:
    """The parts, with what belongs to which said in each entry."""
    result: dict[str, Any] = {"shape": parts[0].shape, "encode": [], "plans": [], "cuts": [], "stalls": []}
    for part in parts:
        which = {"attention": part.attention, "batch": part.batch}
        result["encode"].append(which | {"seconds": part.encode and asdict(part.encode)})
        result["plans"] += [which | asdict(row) | {"gap": row.gap} for row in part.rows]
        result["cuts"].append(which | asdict(part.cut) | {"share": part.cut.share})
        result["stalls"] += [which | asdict(stall) for stall in part.stalls]
    return result


def write(report: dict[str, Any], path: Path) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def table(part: Part) -> str:
    """A part, for eyes: medians [quartiles]."""
    tokens, rows = part.cut.tokens, part.rows
    head = f"{part.shape['name']}, {part.attention}, batch {part.batch}, {tokens} tokens"
    lines = [head, "", f"{'prefill':<12}{'seconds':>22}{'time ratio':>22}{'FLOPs ratio':>13}{'gap':>9}{'KV MB':>10}"]
    lines += [
        f"{row.plan:<12}{spread(row.prefill):>22}{spread(row.prefill_ratio):>22}{row.flops_ratio:>13.3f}"
        f"{100 * row.gap:>+8.1f}%{row.kv_bytes / 1e6:>10.1f}"
        for row in rows
    ]
    if rows[0].new_tokens:
        title = f"{rows[0].new_tokens} tokens"
        lines += ["", f"{title:<12}{'ms a token':>22}{'ratio':>8}{'end to end':>24}{'ratio':>8}{'peak MB':>16}"]
        lines += [_answer_line(row) for row in rows]
    stalled = [f"{s.plan} from {s.prompt}: {s.error}" for s in part.stalls if s.passed is False]
    return "\n".join([*lines, "", _cut_line(part.cut), *stalled, ""])


def _answer_line(row: Row) -> str:
    assert row.decode is not None
    assert row.decode_ratio is not None
    assert row.end_to_end is not None
    assert row.end_to_end_ratio is not None
    peaks = " / ".join("-" if b is None else f"{b / 1e6:.0f}" for b in (row.prefill_peak_bytes, row.peak_bytes))
    return (
        f"{row.plan:<12}{spread(row.decode, 1000.0):>22}{row.decode_ratio.median:>8.3f}"
        f"{spread(row.end_to_end):>24}{row.end_to_end_ratio.median:>8.3f}{peaks:>16}"
    )


def _cut_line(cost: CutCost) -> str:
    parts = ", ".join(f"{name} {1000 * getattr(cost, name).median:.3f}" for name in ("score", "select", "gather"))
    return f"one cut of 20 %: {parts} ms, {100 * cost.share:.2f} % of a layer of {1000 * cost.layer:.1f} ms"


def spread(of: Spread, scale: float = 1.0) -> str:
    """Median and quartiles."""
    return f"{scale * of.median:.3f} [{scale * of.low:.3f}-{scale * of.high:.3f}]"
