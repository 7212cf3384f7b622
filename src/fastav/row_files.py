"""Files of rows: JSON lines of what a run has computed, which a later run of the same kind continues.

Each run that adds to a file first writes a line about itself; its rows follow. A row is identified by its key, and its
last line counts.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, Protocol, TypeVar, runtime_checkable

from fastav.errors import FastAVError, reason_of


@runtime_checkable
class HasKey(Protocol):
    """A frozen dataclass with an identity."""

    @property
    def key(self) -> Any:
        """What identifies the row in its file."""
        ...


R = TypeVar("R", bound=HasKey)


@dataclass(frozen=True, kw_only=True)
class Results(Generic[R]):
    """The content of a file of rows.

    runs: the description of each run that added to it, first to last. rows: the last row of every key.
    """

    runs: tuple[Mapping[str, Any], ...]
    rows: tuple[R, ...]


class RowFile(Generic[R]):
    """A file of rows, open for further rows.  Made by `RowFormat.open`."""

    def __init__(self, file: BinaryIO, runs: Iterable[Mapping[str, Any]], rows: Iterable[R]) -> None:
        self._file, self._runs = file, tuple(runs)
        self._rows = {row.key: row for row in rows}

    @property
    def rows(self) -> tuple[R, ...]:
        """All rows so far."""
        return tuple(self._rows.values())

    @property
    def results(self) -> Results[R]:
        """The current content of the file."""
        return Results(runs=self._runs, rows=self.rows)

    def append(self, row: R) -> None:
        """Write a row immediately.  Raises: OSError."""
        fields: Any = row
        self._write(asdict(fields))
        self._rows[row.key] = row

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormat(Generic[R]):
    """The format of the files of a command.

    command: what writes them, for messages. key: the first key in the line of a run; its value is the version. version:
    of new files; files of earlier versions can be read and continued. same: keys that are equal in all runs of a file,
    like the plans. required: further keys of a run. parse: a row from its JSON object; it raises ValueError, TypeError
    or KeyError.
    """

    command: str
    key: str
    version: int
    same: tuple[str, ...]
    required: tuple[str, ...]
    parse: Callable[[dict[str, Any]], R]

    @contextmanager
    def open(self, path: Path, run: Mapping[str, Any]) -> Iterator[RowFile[R]]:
        """Open a file to append the rows of this run. Existing rows are kept, except an incomplete last line.

        Raises: FastAVError if the file is of another kind of run, or of none; OSError.
        """
        previous: Results[R] = Results(runs=(), rows=())
        if path.is_file():
            data = path.read_bytes()
            previous = self._parse(data, path)
            if previous.runs:
                self._require_same(previous.runs[0], run, path)
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
        with path.open("ab") as file:
            rows: RowFile[R] = RowFile(file, (*previous.runs, run), previous.rows)
            rows._write({self.key: self.version, **run})
            yield rows

    def read(self, path: Path) -> Results[R]:
        """The content of a file of rows.  Raises: FastAVError."""
        try:
            results = self._parse(path.read_bytes(), path)
        except OSError as error:
            raise FastAVError(f"cannot read {path}: {error.strerror}") from None
        if not results.runs:
            raise FastAVError(f"{path} has no rows", f"{self.command} --out writes them")
        return results

    def _parse(self, data: bytes, path: Path) -> Results[R]:
        """The complete lines of a file. An incomplete last line is ignored."""
        prefix = f'{{"{self.key}": '.encode()
        *lines, rest = data.split(b"\n")
        first = lines[0] if lines else rest
        if not (first.startswith(prefix) or (not lines and prefix.startswith(first))):
            raise FastAVError(f"{path} is not a file of rows", f"give a new file, or one of {self.command}")
        runs: list[Mapping[str, Any]] = []
        rows: dict[Any, R] = {}
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if self.key in entry:
                    runs.append(self._parse_run(entry))
                else:
                    row = self.parse(entry)
                    rows[row.key] = row
            except (ValueError, TypeError, KeyError) as error:
                raise FastAVError(
                    f"line {number} of {path} cannot be read: {reason_of(error)}", "delete that line"
                ) from None
        return Results(runs=tuple(runs), rows=tuple(rows.values()))

    def _parse_run(self, entry: dict[str, Any]) -> dict[str, Any]:
        version = entry.pop(self.key)
        if version not in range(1, self.version + 1):
            raise ValueError(f"version {version} is not known, {self.version} is the newest")
        if missing := {*self.same, *self.required, "plans"} - entry.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return entry

    def _require_same(self, old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
        for name in self.same:
            if _without_index(old[name]) != _without_index(new[name]):
                raise FastAVError(
                    f"{path} has rows of the {name} {old[name]!r}, not {new[name]!r}",
                    "give another --out, or delete it",
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
