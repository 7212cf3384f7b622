"""Annotations of benchmarks, from JSON, JSON lines or Parquet files."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastav.errors import InstallationError, TaskError, install_hint, reason_of
from fastav.installation import is_installed


@dataclass(frozen=True, slots=True)
class Annotation:
    """One row of a file of annotations.  file, number: its place, counted from 1. columns: by name."""

    file: str
    number: int
    columns: Mapping[str, Any]

    def error(self, what: str) -> TaskError:
        """The error for a malformed row."""
        return TaskError(
            f"{self.file}, row {self.number}: {what}", "is this the published annotation, whole and unchanged?"
        )

    def text(self, column: str) -> str:
        """A non-blank text; numbers are converted.  Raises: TaskError."""
        value = self._value(column)
        if not _is_text(value) or not str(value).strip():
            raise self.error(f"{column!r} must be text, got {value!r}")
        return str(value).strip()

    def texts(self, column: str) -> tuple[str, ...]:
        """A list of at least one text.  Raises: TaskError."""
        value = self._value(column)
        if not isinstance(value, list) or not value or not all(map(_is_text, value)):
            raise self.error(f"{column!r} must be a list of texts, got {value!r}")
        return tuple(str(one).strip() for one in value)

    def json_list(self, column: str) -> tuple[str, ...]:
        """A list of texts that is stored as a JSON string; can be empty.  Raises: TaskError."""
        text_ = self.text(column)
        try:
            value = json.loads(text_)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, list) or not all(map(_is_text, value)):
            raise self.error(f"{column!r} must be a list written as text, got {text_!r}")
        return tuple(map(str, value))

    def optional_texts(self, column: str) -> tuple[str, ...]:
        """The non-blank texts of a column: from a list with gaps, a single text, or a missing column."""
        value = self.columns.get(column)
        values = value if isinstance(value, list) else [value]
        return tuple(one.strip() for one in values if isinstance(one, str) and one.strip())

    def index(self, column: str, size: int) -> int:
        """An integer in [0, size).  Raises: TaskError."""
        value = self._value(column)
        if type(value) is not int or not 0 <= value < size:
            raise self.error(f"{column!r} must be an integer from 0 to {size - 1}, got {value!r}")
        return value

    def _value(self, column: str) -> Any:
        if column not in self.columns:
            raise self.error(f"there is no {column!r} among {', '.join(self.columns) or 'no columns at all'}")
        return self.columns[column]


def read(
    folder: Path, places: Sequence[str], rows_of: Callable[[Any], Any] = lambda content: content
) -> list[Annotation]:
    """The rows of the first of these places that exists.

    places: paths in the folder without suffix; `*` matches files that belong together. rows_of: extracts the list of
    rows from the content of a file. Raises: TaskError if no place exists, or if a file cannot be read or has no rows.
    """
    for place in places:
        for suffix, load in LOADERS.items():
            if paths := sorted(folder.glob(place + suffix)):
                return [row for path in paths for row in _annotations(path, rows_of(load(path)))]
    searched = " or ".join(f"{place}{{{','.join(LOADERS)}}}" for place in places)
    raise TaskError(
        f"there are no annotations in {folder}; expected {searched}", "docs/tasks.md says where to get them"
    )


def _annotations(path: Path, content: Any) -> Iterable[Annotation]:
    if not isinstance(content, list) or not content or not all(isinstance(one, dict) for one in content):
        raise TaskError(f"{path.name} is not a list of annotations", "is it the published file, whole and unchanged?")
    return (Annotation(path.name, number, columns) for number, columns in enumerate(content, start=1))


def _is_text(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _json(path: Path) -> Any:
    return _parse(path, _content(path))


def _json_lines(path: Path) -> list[Any]:
    lines = enumerate(_content(path).split("\n"), start=1)
    return [_parse(path, line, f"line {number} of ") for number, line in lines if line.strip()]


def _parquet(path: Path) -> list[Any]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        need, alternative = (
            f"reading {path.name} needs pyarrow, which",
            "export the same columns to JSON lines (.jsonl)",
        )
        if is_installed("pyarrow"):
            hint = f"install a pyarrow that fits the other packages here, or {alternative}"
            raise InstallationError(f"{need} cannot be imported: {reason_of(error)}", hint) from error
        raise InstallationError(f"{need} is not installed", f"{install_hint('eval')}, or {alternative}") from None
    try:
        with ParquetFile(path) as file:
            return file.read().to_pylist()
    except (ArrowException, OSError) as error:
        raise TaskError(
            f"{path.name} cannot be read as Parquet: {reason_of(error)}", "is the file complete?"
        ) from error


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {reason_of(error)}", "expected a text file in UTF-8") from error


def _parse(path: Path, text: str, where: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TaskError(f"{where}{path.name} is not JSON: {error}", "is the file complete?") from error


LOADERS: Mapping[str, Callable[[Path], Any]] = {".json": _json, ".jsonl": _json_lines, ".parquet": _parquet}
