"""Sources of clips: a file by its path, or bytes in memory."""

import binascii
import os
import re
import stat
import struct
from base64 import b64decode
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from fastav.errors import UnreadableMedia, reason_of
from fastav.media.policy import MediaPolicy, fetch, without_query

UNKNOWN_SIZE = 0x7FFF_0000
"""Sizes in the header of a RIFF file from here on mean that the size is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A media file.

    name: its name in messages. path: its path, or None if `data` has its bytes. max_pixels, formats: as in
    `MediaPolicy`.
    """

    name: str
    path: Path | None = None
    data: bytes = field(default=b"", repr=False)
    max_pixels: int | None = None
    formats: frozenset[str] | None = None

    def check_pixels(self, width: int, height: int) -> None:
        """Raise UnreadableMedia if frames of this size are too large."""
        if self.max_pixels is not None and width * height > self.max_pixels:
            message = f"{self.name} has frames of {width} x {height}; the limit is {self.max_pixels:,} pixels"
            raise UnreadableMedia(message, "scale it down first")

    def check(self) -> None:
        """Raise UnreadableMedia if there is no readable file, or if it is empty."""
        size = len(self.data) if self.path is None else _size(self.path)
        if size == 0:
            raise UnreadableMedia(f"{self.name} is empty (0 bytes)", "was the download or copy interrupted?")

    def head(self, count: int) -> bytes:
        """The first bytes."""
        if self.path is None:
            return self.data[:count]
        with self.path.open("rb") as file:
            return file.read(count)

    def truncation(self) -> tuple[int, int] | None:
        """The actual and the expected number of bytes of a truncated WAV, AVI or WebP file; None for a complete one."""
        kind, size = struct.unpack("<4sI", self.head(8).ljust(8, b"\0"))
        have = len(self.data) if self.path is None else self.path.stat().st_size
        # recorders write a size near the maximum if they do not know it yet
        if kind != b"RIFF" or size >= UNKNOWN_SIZE or have >= 0.99 * (size + 8):
            return None
        return have, size + 8

    def stream(self) -> BytesIO:
        """The bytes as a file object; its name has only the suffix that FFmpeg needs to detect the format."""
        stream = _NamedBytes(self.data)
        stream.name = "clip" + (re.search(r"\.\w{1,5}$", self.name) or [""])[0]
        return stream

    def bytes(self) -> bytes:
        """All bytes.  Raises: OSError."""
        return self.data if self.path is None else self.path.read_bytes()


class _NamedBytes(BytesIO):
    name = ""


def source_of(source: Any, policy: MediaPolicy) -> Source:
    """The source for what a user gives.

    source: a path, a URL (`file:`, `http:`, `https:`, `data:`), the bytes of a media file, or a binary file object,
    which is read to its end. Raises: UnreadableMedia.
    """
    return replace(_located(source, policy), max_pixels=policy.max_pixels, formats=policy.formats)


def _located(source: Any, policy: MediaPolicy) -> Source:
    if isinstance(source, bytes | bytearray | memoryview):
        return Source(name="the clip", data=bytes(source))
    if hasattr(source, "read"):
        return _read_file(source, policy)
    try:
        text = os.fsdecode(source)
    except TypeError:
        raise UnreadableMedia(
            f"a clip cannot be opened from {type(source).__name__}",
            "give a path, a URL, the bytes of a media file, or a file opened with 'rb'",
        ) from None
    if not text.strip():
        raise UnreadableMedia("the path of the clip is empty", "give a path, or a URL")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", text) if isinstance(source, str) else None
    match scheme and scheme[1].lower():
        case "http" | "https":
            return Source(name=_url_name(text), data=fetch(text, policy))
        case "data":
            return Source(name="the clip", data=_decode_data_url(text))
        case "file":
            path = _file_url_path(text)
        case None:
            path = Path(text)
        case other if text.startswith(f"{scheme and scheme[0]}//"):
            raise UnreadableMedia(f"{other}:// cannot be opened", "give a path, file://, http:// or https://")
        case _:
            path = Path(text)  # a file name with a colon
    if not policy.files:
        raise UnreadableMedia(f"{path.name} is not opened: files are disabled here", "send the content of the clip")
    return Source(name=path.name, path=path)


def _read_file(file: Any, policy: MediaPolicy) -> Source:
    name = getattr(file, "name", None)
    name = Path(name).name if isinstance(name, str) and name else "the clip"
    try:
        data = file.read(policy.max_bytes + 1)
    except (OSError, ValueError) as error:  # closed, or opened for writing
        raise UnreadableMedia(f"{name} cannot be read: {error}", "open it with 'rb'") from error
    if not isinstance(data, bytes | bytearray | memoryview):
        raise UnreadableMedia(f"{name} gives {type(data).__name__} and not bytes", "open it with 'rb'")
    if len(data) > policy.max_bytes:
        raise UnreadableMedia(f"{name} is larger than {policy.max_bytes:,} bytes", "give its path")
    return Source(name=name, data=bytes(data))


def _file_url_path(url: str) -> Path:
    """The path of a `file:` URL."""
    parts = urlsplit(url, allow_fragments=False)
    if parts.netloc not in ("", "localhost"):
        raise UnreadableMedia(
            f"{url} is on another machine ({parts.netloc})", "use three slashes: file:///folder/clip.mp4"
        )
    query = f"?{parts.query}" if parts.query else ""  # file URLs have no queries, so it is part of the name
    return Path(url2pathname(parts.path + query))


def _decode_data_url(url: str) -> bytes:
    """The content of a `data:` URL."""
    kind, comma, content = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        return b64decode(unquote(content), validate=True) if kind.endswith(";base64") else unquote_to_bytes(content)
    except (binascii.Error, ValueError) as error:
        raise UnreadableMedia(f"the data: URL has no clip: {error}", "write data:video/mp4;base64,...") from None


def _url_name(url: str) -> str:
    address = without_query(url)
    return unquote(address.rstrip("/").rpartition("/")[2]) or address


def _size(path: Path) -> int:
    """The size of a file.  Raises: UnreadableMedia if there is no readable file."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableMedia(f"{path} is a directory", "give one media file")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableMedia(f"{path} is not a regular file", "save the clip to a file first")
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise UnreadableMedia(f"no such file: {path}", "check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UnreadableMedia(f"{path} cannot be opened: {reason}", "check the path and its permissions") from error
    return status.st_size
