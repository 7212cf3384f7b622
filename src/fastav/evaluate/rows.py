"""The file of an evaluation: a line for every run that added to it, and one for every answer, as they come."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from fastav.errors import FastAVError, reason_of

VERSION = 1
KEY = "fastav_eval"  # what the line of a run begins with
_PREFIX = f'{{"{KEY}": '.encode()
_RUN_KEYS = ("task", "model", "device", "dtype")  # in all runs of a file, and the plans


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one plan answered to one sample.

    gold: the sample's answer. score: in [0, 1]. prompt_tokens: by modality, before pruning. flops, kv_bytes: of the
    prefill, `full` and `pruned`. seconds: by phase. error: why there is no answer; all that follows `gold` is then
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
        """Sample and plan, which name a row."""
        return self.sample, self.plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a file holds.

    runs: what each run that added to it says of itself, the first one first. rows: the last of every (sample, plan).
    """

    runs: tuple[Mapping[str, Any], ...]
    rows: tuple[Row, ...]


class RowFile:
    """An evaluation's file, open for more rows.  Made by `opened`."""

    def __init__(self, file: BinaryIO, runs: Iterable[Mapping[str, Any]], rows: Iterable[Row]) -> None:
        self._file, self._runs = file, tuple(runs)
        self._rows = {row.key: row for row in rows}

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows so far."""
        return tuple(self._rows.values())

    @property
    def results(self) -> Results:
        """What the file holds now."""
        return Results(runs=self._runs, rows=self.rows)

    def append(self, row: Row) -> None:
        """Write a row, at once.  Raises: OSError."""
        self._write(asdict(row))
        self._rows[row.key] = row

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


@contextmanager
def open_rows(path: Path, run: Mapping[str, Any]) -> Iterator[RowFile]:
    """A file to which this run appends its rows; what is there already is kept, but for a last line that was cut off.

    run: what `Evaluation.head` says.
    Raises: FastAVError if the file is no evaluation's, or another's; OSError.
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
    """What a file of rows holds.  Raises: FastAVError."""
    try:
        results = _parse(path.read_bytes(), path)
    except OSError as error:
        raise FastAVError(f"cannot read {path}: {error.strerror}") from None
    if not results.runs:
        raise FastAVError(f"{path} holds no rows", "fastav eval --out writes them")
    return results


def _parse(data: bytes, path: Path) -> Results:
    """Whole lines; behind the last line break stands at most the beginning of one, which does not count."""
    *lines, rest = data.split(b"\n")
    first = lines[0] if lines else rest
    if not (first.startswith(_PREFIX) or (not lines and _PREFIX.startswith(first))):
        raise FastAVError(f"{path} is no file of rows", "name a file that is not there yet, or one of fastav eval")
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
                f"{path} holds rows of the {name} {old[name]!r}, not {new[name]!r}", "give another --out, or delete it"
            )
    previous, now = ({(name, plan["fingerprint"]) for name, plan in run["plans"].items()} for run in (old, new))
    if previous != now:
        changed = ", ".join(sorted({name for name, _ in previous ^ now}))
        raise FastAVError(
            f"{path} holds rows of other plans (they differ in {changed})",
            "give another --out, or the same plans as before",
        )


def _without_index(value: Any) -> Any:
    """`cuda:1` is as good as `cuda:0`."""
    return re.sub(r"^cuda:\d+$", "cuda", value) if isinstance(value, str) else value
