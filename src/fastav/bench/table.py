"""What files of `fastav bench` hold, as Markdown: `python -m fastav.bench.table results/*.json --into README.md`.

Without --into the tables are printed; with it they are written between two marks in that file. Other files among those
given are left out.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastav.bench.report import read
from fastav.bench.targets import counted
from fastav.errors import FastAVError
from fastav.files import atomic_write

Json = Mapping[str, Any]
START, END = "<!-- speed: python -m fastav.bench.table -->", "<!-- /speed -->"
HEAD = (
    "| prompt, batch | contender | prefill, ms | of transformers' | FLOPs | over limit | ms a token | over limit "
    "| end to end, ms | of transformers' | peak above weights | KV cache |"
)


def markdown(reports: Sequence[Json]) -> str:
    """A table for every report, its circumstances, and the targets it was judged by."""
    if not reports:
        raise FastAVError("no file holds what fastav bench measures", "give files that fastav bench --out wrote")
    return "\n\n".join("\n".join(_lines(report)) for report in reports)


def _lines(report: Json) -> Iterator[str]:
    machine = report["machine"].get("gpu") or f"{report['machine']['cpu']}, threads: {report['machine']['threads']}"
    versions = f"torch {report['versions']['torch']}, transformers {report['versions']['transformers']}"
    weights = f"{report['weight_bytes'] / 1e9:.2f} GB of random weights in {report['dtype']}"
    yield f"**{report['model']}**, {weights}, on {machine}"
    yield f"(`{report['command']}`, commit {report['commit'] or 'unknown'}, {versions}):"
    yield ""
    yield HEAD
    yield "|---" * (HEAD.count("|") - 1) + "|"
    for part in report["parts"]:
        yield from (_row(part, row) for row in part["rows"])
    yield ""
    yield from _verdicts(report)


def _row(part: Json, row: Json) -> str:
    cells = [
        f"{part['tokens']:,}, {part['batch']}",
        f"`{row['contender']}`" if row["plan"] != "none" else row["contender"],
        _ms(row["prefill"]),
        _ratio(row["prefill_ratio"]),
        f"{row['flops_ratio']:.3f}",
        _times(row["prefill_over_limit"]),
        _ms(row["decode"]),
        _times(row["decode_over_limit"]),
        _ms(row["end_to_end"]),
        _ratio(row["end_to_end_ratio"]),
        _mb(row["peak_bytes"] if row["peak_bytes"] is not None else row["prefill_peak_bytes"]),
        _mb(row["kv_bytes"]),
    ]
    return f"| {' | '.join(cells)} |"


def _verdicts(report: Json) -> Iterator[str]:
    """Every target that is about a row, and what became of it; those that are nowhere measured once."""
    judged = list(counted(report))
    known = [(part, row, target) for part, row, target in judged if target["verdict"] != "not measured"]
    for part, row, target in known:
        where = f"{part['tokens']:,} tokens, batch {part['batch']}"
        aim = f"{target['value']:.3f}, at most {target['at_most']:g}"
        yield f"- {target['verdict']}: `{row['contender']}`, {where}: {target['name']}: {aim}"
    measured = {target["name"] for _, _, target in known}
    for name in dict.fromkeys(target["name"] for _, _, target in judged if target["name"] not in measured):
        yield f"- not measured: {name}"


def _ms(of: Json | None) -> str:
    return "-" if of is None else f"{1000 * of['median']:.4g}"


def _ratio(of: Json | None) -> str:
    return "-" if of is None else f"{of['median']:.3f} [{of['low']:.3f}-{of['high']:.3f}]"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f} MB"


def written(text: str, content: str, first: str = START, last: str = END) -> str:
    """The text with this between its marks.  Raises: FastAVError if it has none."""
    before, start, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (start and end):
        raise FastAVError("the file has no place for the table", f"put {first} and {last} on lines of their own")
    return f"{before}{first}\n{content}\n{last}{after}"


def run(
    arguments: Sequence[str] | None,
    *,
    program: str,
    about: str | None,
    read: Callable[[Path], Json | None],
    markdown: Callable[[Sequence[Json]], str],
    marks: tuple[str, str],
) -> int:
    """Print what files hold, or write it into a file between two marks; the exit code.

    read: None for files of others.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=about)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="that the benchmark's --out wrote")
    parser.add_argument("--into", type=Path, metavar="FILE.md", help="write between this file's marks")
    options = parser.parse_args(arguments)
    try:
        content = markdown([report for file in options.files if (report := read(file)) is not None])
        if options.into is None:
            print(content)
            return 0
        text = written(options.into.read_text(encoding="utf-8"), content, *marks)
        with atomic_write(options.into) as part:
            part.write_text(text, encoding="utf-8")
    except (FastAVError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or write them into a file."""
    return run(arguments, program="fastav.bench.table", about=__doc__, read=read, markdown=markdown, marks=(START, END))


if __name__ == "__main__":
    sys.exit(main())
