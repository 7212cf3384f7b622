"""The file of an evaluation: one JSON line per run that added to it, and one per answer."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from fastav.errors import FastAVError, reason_of

VERSION = 1
KEY = "fastav_eval"  # first key in the line of a run
_PREFIX = f'{{"{KEY}": '.encode()
_RUN_KEYS = ("task", "model", "device", "dtype")  # equal in all runs of a file, like the plans


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The answer of one plan to one sample.

    gold: the sample's answer. score: in [0, 1]. prompt_tokens: by modality, before pruning. flops, kv_bytes: of the
    prefill, `full` and `pruned`. seconds: by phase. error: why there is no answer; the fields after `gold` are then
    empty.
    """

    task: str
    sample: str
    family: str
    plan: str
    fingerprint: str
    gold: str
    answer: str = ""
    score: float | int = 0
    parsed: bool = False
    prompt_tokens: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)
    kv_bytes: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float | int] = field(default_factory=dict)
    new_tokens: int = 0
    error: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Sample and plan, which identify a row."""
        return self.sample, self.plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The content of a file of rows.

    runs: the description of each run that added to it, first to last. rows: the last row of every (sample, plan).
    """

    runs: tuple[Mapping[str, Any], ...]
    rows: tuple[Row, ...]


class RowFile:
    """The file of an evaluation, open for further rows.  Made by `open_rows`."""

    def __init__(self, file: BinaryIO, runs: Iterable[Mapping[str, Any]], rows: Iterable[Row]) -> None:
        self._file, self._runs = file, tuple(runs)
        self._rows = {row.key: row for row in rows}

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows so far."""
        return tuple(self._rows.values())

    @property
    def results(self) -> Results:
        """The current content of the file."""
        return Results(runs=self._runs, rows=self.rows)

    def append(self, row: Row) -> None:
        """Write a row immediately.  Raises: OSError."""
        self._write(asdict(row))
        self._rows[row.key] = row

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


@contextmanager
def open_rows(path: Path, run: Mapping[str, Any]) -> Iterator[RowFile]:
    """Open a file to append the rows of this run. Existing rows are kept, except an incomplete last line.

    run: as `Evaluation.head` returns it.
    Raises: FastAVError if the file is of another evaluation, or of none; OSError.
    """
    previous = Results(runs=(), rows=())
    if path.is_file():
        data = path.read_bytes()
        previous = _parse(data, path)
        if previous.runs:
            _require_same(previous.runs[0], run, path)
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
    with path.open("ab") as file:
        rows = RowFile(file, (*previous.runs, run), previous.rows)
        rows._write({KEY: VERSION, **run})
        yield rows


def read(path: Path) -> Results:
    """The content of a file of rows.  Raises: FastAVError."""
    try:
        results = _parse(path.read_bytes(), path)
    except OSError as error:
        raise FastAVError(f"cannot read {path}: {error.strerror}") from None
    if not results.runs:
        raise FastAVError(f"{path} has no rows", "fastav eval --out writes them")
    return results


def _parse(data: bytes, path: Path) -> Results:
    """The complete lines of a file. An incomplete last line is ignored."""
    *lines, rest = data.split(b"\n")
    first = lines[0] if lines else rest
    if not (first.startswith(_PREFIX) or (not lines and _PREFIX.startswith(first))):
        raise FastAVError(f"{path} is not a file of rows", "give a new file, or one of fastav eval")
    runs: list[Mapping[str, Any]] = []
    rows: dict[tuple[str, str], Row] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if KEY in entry:
                runs.append(_parse_run(entry))
            else:
                row = _parse_row(entry)
                rows[row.key] = row
        except (ValueError, TypeError, KeyError) as error:
            raise FastAVError(
                f"line {number} of {path} cannot be read: {reason_of(error)}", "delete that line"
            ) from None
    return Results(runs=tuple(runs), rows=tuple(rows.values()))


def _parse_run(entry: dict[str, Any]) -> dict[str, Any]:
    if entry.pop(KEY) != VERSION:
        raise ValueError(f"only version {VERSION} is known")
    if missing := {*_RUN_KEYS, "plans", "families"} - entry.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return entry


def _parse_row(entry: dict[str, Any]) -> Row:
    row = Row(**{f.name: entry[f.name] for f in fields(Row)})
    if row.error is None and not all({"full", "pruned"} <= saving.keys() for saving in (row.flops, row.kv_bytes)):
        raise ValueError("flops and kv_bytes need full and pruned")
    return row


def _require_same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    for name in _RUN_KEYS:
        if _without_index(old[name]) != _without_index(new[name]):
            raise FastAVError(
                f"{path} has rows of the {name} {old[name]!r}, not {new[name]!r}", "give another --out, or delete it"
            )
    previous, now = ({(name, plan["fingerprint"]) for name, plan in run["plans"].items()} for run in (old, new))
    if previous != now:
        changed = ", ".join(sorted({name for name, _ in previous ^ now}))
        raise FastAVError(
            f"{path} has rows of other plans (they differ in {changed})",
            "give another --out, or the same plans as before",
        )


def _without_index(value: Any) -> Any:
    """The value; `cuda:1` and `cuda:0` are equal for this purpose."""
    return re.sub(r"^cuda:\d+$", "cuda", value) if isinstance(value, str) else value
