"""What the load benchmark wrote, as Markdown.

    python -m fastav.bench.load.table results/load-*.json --into docs/vllm.md

Without --into the tables are printed; with it they are written between two marks in that file. Other files among those
given are left out.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastav.bench.load.contenders import OFF
from fastav.bench.load.report import read
from fastav.bench.table import run
from fastav.errors import FastAVError

Json = Mapping[str, Any]
START, END = "<!-- load: python -m fastav.bench.load.table -->", "<!-- /load -->"
HEAD = (
    "| clients | contender | answered | requests a second | of `off` | tokens a second | first token, ms (p95) "
    "| from token to token, ms (p95) | CPU s a request | of `off` | running, waiting | KV cache | preemptions |"
)


def markdown(reports: Sequence[Json]) -> str:
    """Every report's circumstances, its prompts, and a row for each contender at each level."""
    if not reports:
        raise FastAVError(
            "no file holds what the load benchmark measures", "give files that python -m fastav.bench.load --out wrote"
        )
    return "\n\n".join("\n".join(_lines(report)) for report in reports)


def _lines(report: Json) -> Iterator[str]:
    machine = report["machine"].get("gpu") or f"{report['machine']['cpu']}, {report['machine']['cores']} cores"
    decoder, versions = report["decoder"], report["versions"]
    rounds = max((row["rounds"] for row in report["rows"]), default=0)
    yield f"**{report['model']}**, {decoder['layers']} layers, {decoder['hidden']} wide, on {machine}, {rounds} rounds"
    yield f"(`{report['command']}`, commit {report['commit'] or 'unknown'},"
    yield f"vLLM {versions['vllm']}, torch {versions['torch']}):"
    yield ""
    yield HEAD
    yield "|---" * (HEAD.count("|") - 1) + "|"
    yield from map(_row, report["rows"])
    yield ""
    yield from _prompts(report)
    yield ""
    yield from _answers(report)


def _row(row: Json) -> str:
    cells = [
        f"{row['clients']}",
        row["contender"] if row["contender"] == OFF else f"`{row['contender']}`",
        f"{row['answered']} of {row['asked']}",
        _number(row["requests_per_second"], 2),
        _ratio(row["requests_per_second_ratio"]),
        _number(row["output_tokens_per_second"], 1),
        _ms(row["first"]),
        _ms(row["gap"]),
        _number(row["cpu_per_request"], 2),
        _ratio(row["cpu_per_request_ratio"]),
        f"{row['running']}, {row['waiting']}",
        f"{100 * row['cache']:.0f} %",
        f"{row['preemptions']}",
    ]
    return f"| {' | '.join(cells)} |"


def _prompts(report: Json) -> Iterator[str]:
    """How many tokens there are of each kind of prompt, and how many each contender's layers hold on average."""
    names = [name for name in report["servers"] if name != OFF]
    yield f"| prompt | tokens | {' | '.join(f'`{name}`' for name in names)} |"
    yield "|---" * (len(names) + 2) + "|"
    for prompt in report["prompts"]:
        kinds = " + ".join(f"{n:,} {kind}" for kind, n in prompt["by_modality"].items())
        held = [_held(prompt, name) for name in names]
        yield f"| {prompt['kind']} | {kinds} = {prompt['tokens']:,} | {' | '.join(held)} |"


def _held(prompt: Json, name: str) -> str:
    """Tokens a layer; of a prompt that comes to the first layer with fewer tokens, those."""
    if name in prompt["mean_layer"]:
        return f"{prompt['mean_layer'][name]:,.0f} a layer, {prompt['last_layer'][name]:,} in the last"
    return f"{prompt['counted'].get(name, 0):,} in every layer"


def _answers(report: Json) -> Iterator[str]:
    for name, told in report["answers"].items():
        as_off = (
            "" if name == OFF else f"; {told['as_off']} of {told['questions']} questions are answered as `off` does"
        )
        yield f"- `{name}`: of {told['again']} answers to a question asked again {told['differed']} differ{as_off}"
    yield from (f"- wrong: {what}" for what in report["wrong"])


def _number(of: Json | None, digits: int) -> str:
    return "-" if of is None else f"{of['median']:.{digits}f}"


def _ratio(of: Json | None) -> str:
    return "-" if of is None else f"{of['median']:.2f} [{of['low']:.2f}-{of['high']:.2f}]"


def _ms(of: Json | None) -> str:
    return "-" if of is None else f"{1000 * of['median']:,.0f} ({1000 * of['p95']:,.0f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or write them into a file."""
    return run(
        arguments, program="fastav.bench.load.table", about=__doc__, read=read, markdown=markdown, marks=(START, END)
    )


if __name__ == "__main__":
    sys.exit(main())
