"""Reports of `fastav bench` as Markdown: `python -m fastav.bench.table results/*.json --into docs/results.md`.

Without --into the tables are printed; with it they replace what stands between two marks in that file. Files that hold
no report are skipped.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastav.bench.report import cell, machine, megabytes, milliseconds, read, share, times
from fastav.errors import FastAVError
from fastav.files import atomic_write

Json = Mapping[str, Any]


class Kind(NamedTuple):
    """A kind of report, and how its tables are written.

    program: the module that writes them. mark: names the place in a file, `<!-- mark: ... -->` to `<!-- /mark -->`.
    key: where its reports have their format. source: the program that writes its reports. lines: of one report.
    """

    program: str
    mark: str
    key: str
    source: str
    lines: Callable[[Json], Iterable[str]]

    @property
    def start(self) -> str:
        """The mark before the tables."""
        return f"<!-- {self.mark}: python -m {self.program} -->"

    @property
    def end(self) -> str:
        """The mark after the tables."""
        return f"<!-- /{self.mark} -->"

    def markdown(self, files: Sequence[Path]) -> str:
        """The tables of all reports among the files.  Raises: FastAVError if there is none."""
        reports = [report for file in files if (report := read(file, self.key)) is not None]
        if not reports:
            raise FastAVError(f"no file holds a report of {self.source}", f"name files that {self.source} --out wrote")
        return "\n\n".join("\n".join(self.lines(report)) for report in reports)

    def replaced(self, text: str, content: str) -> str:
        """The text with this content between its marks.  Raises: FastAVError if it has none."""
        before, start, rest = text.partition(self.start)
        _, end, after = rest.partition(self.end)
        if not (start and end):
            raise FastAVError(
                "the file has no place for the table", f"put {self.start} and {self.end} on lines of their own"
            )
        return f"{before}{start}\n{content}\n{end}{after}"

    def main(self, arguments: Sequence[str] | None = None, about: str | None = None) -> int:
        """Print the tables, or write them into a file; the exit code."""
        parser = argparse.ArgumentParser(prog=f"python -m {self.program}", description=about)
        parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help=f"reports of {self.source}")
        parser.add_argument("--into", type=Path, metavar="FILE.md", help="write between the marks of this file")
        options = parser.parse_args(arguments)
        try:
            content = self.markdown(options.files)
            if options.into is None:
                print(content)
                return 0
            text = self.replaced(options.into.read_text(encoding="utf-8"), content)
            with atomic_write(options.into) as part:
                part.write_text(text, encoding="utf-8")
        except (FastAVError, OSError) as error:
            print(f"{self.program}: {error}", file=sys.stderr)
            return 2
        return 0


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def provenance(report: Json, *versions: str) -> str:
    """`` `command`, commit abc1234, torch 2.13.0``."""
    packages = ", ".join(f"{label} {report['versions'][label.lower()]}" for label in versions)
    return f"(`{report['command']}`, commit {report['commit'] or 'unknown'}, {packages}):"


HEAD = (
    "prompt, batch",
    "contender",
    "prefill, ms",
    "of transformers'",
    "retention",
    "FLOPs",
    "over limit",
    "ms a token",
    "over limit",
    "end to end, ms",
    "of transformers'",
    "peak above weights",
    "KV cache",
)


def _lines(report: Json) -> Iterator[str]:
    """A report's circumstances, its rows, and the verdicts of the targets."""
    weights = f"{report['weight_bytes'] / 1e9:.2f} GB of random weights in {report['dtype']}"
    yield f"**{report['model']}**, {weights}, on {machine(report)}"
    yield provenance(report, "torch", "transformers")
    yield ""
    yield from grid(HEAD, [_row(part, row) for part in report["parts"] for row in part["rows"]])
    yield ""
    yield from _verdicts(report)


def _row(part: Json, row: Json) -> list[str]:
    peak = row["prefill_peak_bytes"] if row["peak_bytes"] is None else row["peak_bytes"]
    return [
        f"{part['tokens']:,}, {part['batch']}",
        f"`{row['contender']}`" if row["plan"] != "none" else row["contender"],
        milliseconds(row["prefill"], brief=True),
        cell(row["prefill_ratio"]),
        share(row.get("mean_retention")),
        share(row["flops_ratio"]),
        times(row["prefill_over_limit"]),
        milliseconds(row["decode"], brief=True),
        times(row["decode_over_limit"]),
        milliseconds(row["end_to_end"], brief=True),
        cell(row["end_to_end_ratio"]),
        *(megabytes(size, ",.0f") + " MB" * (size is not None) for size in (peak, row["kv_bytes"])),
    ]


def _verdicts(report: Json) -> Iterator[str]:
    """The verdict of every target about a row; targets that no row measures, once each."""
    verdicts = [(part, row, t) for part in report["parts"] for row in part["rows"] for t in row["targets"]]
    measured = [verdict for verdict in verdicts if verdict[2]["verdict"] != "not measured"]
    for part, row, target in measured:
        where = f"{part['tokens']:,} tokens, batch {part['batch']}"
        aim = f"{target['value']:.3f}, at most {target['at_most']:g}"
        yield f"- {target['verdict']}: `{row['contender']}`, {where}: {target['name']}: {aim}"
    names = {target["name"] for _, _, target in measured}
    for name in dict.fromkeys(target["name"] for _, _, target in verdicts if target["name"] not in names):
        yield f"- not measured: {name}"


SPEED = Kind(program="fastav.bench.table", mark="speed", key="fastav_bench", source="fastav bench", lines=_lines)

if __name__ == "__main__":
    sys.exit(SPEED.main(about=__doc__))
