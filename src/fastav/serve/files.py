"""Files that clients upload, and the clips that come with the package.  They are kept in memory, under random names."""

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from fastav.errors import FastAVError

MAX_FILES = 1000
EXAMPLE = "example-"


class UnknownFile(FastAVError):
    """No file has this id."""


class StoreFull(FastAVError):
    """There is no room for a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """An uploaded file.  name, kind: what the client called it, for the client alone; kind is a MIME type."""

    id: str
    name: str
    kind: str
    data: bytes = field(repr=False)
    purpose: str
    created: int

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.data),
            "created_at": self.created,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class FileStore:
    """Uploaded files, in memory: with `max_bytes` together, the oldest makes room for a new one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._files = max_bytes, OrderedDict[str, StoredFile]()

    def add(self, name: str, kind: str, data: bytes, purpose: str) -> StoredFile:
        """Keep a file.  Raises: StoreFull if it is larger than the whole store."""
        if len(data) > self._max_bytes:
            raise StoreFull(f"a file may have {self._max_bytes:,} bytes here, and this one has {len(data):,}")
        while self._files and (self.bytes + len(data) > self._max_bytes or len(self._files) >= MAX_FILES):
            self._files.popitem(last=False)
        one = StoredFile(
            id=f"file-{secrets.token_hex(16)}",
            name=name[:255],
            kind=kind[:100],
            data=data,
            purpose=purpose[:100],
            created=int(time.time()),
        )
        self._files[one.id] = one
        return one

    @property
    def bytes(self) -> int:
        """The bytes of all files."""
        return sum(len(one.data) for one in self._files.values())

    def all(self) -> list[StoredFile]:
        """All files, the oldest first."""
        return list(self._files.values())

    def get(self, identifier: str) -> StoredFile:
        """The file with this id, of an upload or an example.  Raises: UnknownFile."""
        if identifier in self._files:
            return self._files[identifier]
        if identifier in examples():
            return examples()[identifier].file
        raise UnknownFile(f"there is no file {identifier[:80]!r}", "upload it again: old files make room for new ones")

    def delete(self, identifier: str) -> None:
        """Forget an upload.  Raises: UnknownFile."""
        if self._files.pop(identifier, None) is None:
            raise UnknownFile(f"there is no file {identifier[:80]!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A clip that comes with the package, and questions about it."""

    file: StoredFile
    seconds: float
    questions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For the page."""
        return {
            "id": self.file.id,
            "name": self.file.name,
            "kind": "video",
            "seconds": round(self.seconds, 3),
            "questions": list(self.questions),
            "bytes": len(self.file.data),
        }


@cache
def examples() -> Mapping[str, Example]:
    """The clips of the package, by id."""
    from fastav.media import Clip

    folder = files("fastav") / "assets" / "clips"
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    known = {}
    for name, asked in questions.items():
        data = (folder / name).read_bytes()
        identifier = EXAMPLE + name.rpartition(".")[0]
        known[identifier] = Example(
            file=StoredFile(id=identifier, name=name, kind="video/mp4", data=data, purpose="example", created=0),
            seconds=Clip.open(data).duration,
            questions=tuple(one["question"] for one in asked),
        )
    return known
