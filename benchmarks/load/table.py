"""Reports of the load test as Markdown: `python -m benchmarks.load.table results/load-*.json --into docs/vllm.md`.

Without --into the tables are printed; with it they replace what stands between two marks in that file. Files that hold
no report are skipped.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.load.contenders import OFF
from fastav.bench.report import cell, modalities
from fastav.bench.table import Kind, grid, provenance

Json = Mapping[str, Any]
HEAD = (
    "clients",
    "contender",
    "answered",
    "requests a second",
    "of `off`",
    "tokens a second",
    "first token, ms (p95)",
    "from token to token, ms (p95)",
    "CPU s a request",
    "of `off`",
    "running, waiting",
    "KV cache",
    "preemptions",
)


def _lines(report: Json) -> Iterator[str]:
    """A report's circumstances, its rows, its prompts, and how far answers agree."""
    machine = report["machine"].get("gpu") or f"{report['machine']['cpu']}, {report['machine']['cores']} cores"
    decoder, rounds = report["decoder"], max((row["rounds"] for row in report["rows"]), default=0)
    yield f"**{report['model']}**, {decoder['layers']} layers, {decoder['hidden']} wide, on {machine}, {rounds} rounds"
    yield provenance(report, "vLLM", "torch")
    yield ""
    yield from grid(HEAD, map(_row, report["rows"]))
    yield ""
    names = [name for name in report["servers"] if name != OFF]
    prompts = [_prompt(prompt, names) for prompt in report["prompts"]]
    yield from grid(["prompt", "tokens", *(f"`{name}`" for name in names)], prompts)
    yield ""
    yield from _agreement(report)


def _row(row: Json) -> list[str]:
    return [
        f"{row['clients']}",
        row["contender"] if row["contender"] == OFF else f"`{row['contender']}`",
        f"{row['answered']} of {row['asked']}",
        cell(row["requests_per_second"], ".2f", brief=True),
        cell(row["requests_per_second_ratio"], ".2f"),
        cell(row["output_tokens_per_second"], ".1f", brief=True),
        _milliseconds(row["first"]),
        _milliseconds(row["gap"]),
        cell(row["cpu_per_request"], ".2f", brief=True),
        cell(row["cpu_per_request_ratio"], ".2f"),
        f"{row['running']}, {row['waiting']}",
        f"{100 * row['cache']:.0f} %",
        f"{row['preemptions']}",
    ]


def _prompt(prompt: Json, names: list[str]) -> list[str]:
    """Tokens of a kind of prompt, and those that each contender's layers run on."""
    return [prompt["kind"], modalities(prompt["by_modality"]), *(_layers(prompt, name) for name in names)]


def _layers(prompt: Json, name: str) -> str:
    """The mean over layers, and the last layer; the server's count for tokens that vLLM drops before the first."""
    if name in prompt["mean_layer"]:
        return f"{prompt['mean_layer'][name]:,.0f} a layer, {prompt['last_layer'][name]:,} in the last"
    return f"{prompt['counted'].get(name, 0):,} in every layer"


def _agreement(report: Json) -> Iterator[str]:
    for name, counts in report["answers"].items():
        as_off = f"; {counts['as_off']} of {counts['questions']} questions are answered as `off` does"
        repeats = f"of {counts['again']} answers to a question asked again {counts['differed']} differ"
        yield f"- `{name}`: {repeats}{'' if name == OFF else as_off}"
    yield from (f"- wrong: {what}" for what in report["wrong"])


def _milliseconds(times: Json | None) -> str:
    return "-" if times is None else f"{1000 * times['median']:,.0f} ({1000 * times['p95']:,.0f})"


LOAD = Kind(
    program="benchmarks.load.table", mark="load", key="fastav_load", source="python -m benchmarks.load", lines=_lines
)

if __name__ == "__main__":
    sys.exit(LOAD.main(about=__doc__))
