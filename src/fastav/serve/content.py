"""Content parts of OpenAI's chat messages as fastav's, with the bytes of their media."""

import asyncio
import os
import stat
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from fastav.errors import FastAVError, MediaError, UnreadableMedia
from fastav.media._source import source_of
from fastav.media.policy import MediaPolicy
from fastav.serve.files import FileStore
from fastav.serve.limits import Limits
from fastav.serve.protocol import InvalidRequest

URL_PARTS = {"image_url": "image", "video_url": "video", "audio_url": "audio"}
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
TEXT_NOTES = ("annotations", "cache_control")  # for other servers, without an effect on the answer
MESSAGE_FIELDS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "refusal",
    "annotations",
    "reasoning",
    "reasoning_content",
)
SIGNATURES = {  # how files begin
    "image": (b"\x89PNG", b"\xff\xd8\xff", b"BM"),
    "audio": (b"ID3", b"fLaC", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xf1", b"\xff\xf9"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaAccess:
    """Which media a request may name besides those that it brings.

    files: the uploads. root: `file://` URLs may name files below this folder; None for none. domains: hosts from which
    http and https URLs are loaded; None for none. private: whether these hosts may have addresses that are not public.
    """

    files: FileStore
    limits: Limits
    root: Path | None = None
    domains: frozenset[str] | None = None
    private: bool = False
    policy: MediaPolicy = field(init=False)
    downloads: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        policy = MediaPolicy(
            files=False,
            urls=self.domains is not None,
            hosts=self.domains or frozenset(),
            public_only=not self.private,
            max_bytes=self.limits.body_bytes,
            max_seconds=self.limits.decode_seconds,
        )
        object.__setattr__(self, "policy", policy)
        # a request waits for one download at a time, so slow hosts hold up nothing but their own requests
        object.__setattr__(self, "downloads", asyncio.Semaphore(self.limits.queue))

    async def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Chat messages as `fastav.Request` takes them, whose media are bytes.

        Raises: InvalidRequest, MediaError, UnknownFile; each with the place in the messages.
        """
        if len(messages) > self.limits.messages:
            raise InvalidRequest(
                f"a request may have {self.limits.messages} messages, and this one has {len(messages)}"
            )
        _check(messages, self.limits)
        left = _Left(self.limits.body_bytes)
        loaded = [await self._message(one, f"messages[{index}]", left) for index, one in enumerate(messages)]
        n_chars = sum(len(part["text"]) for message in loaded for part in _parts(message) if part["type"] == "text")
        if n_chars > self.limits.text_chars:
            raise InvalidRequest(
                f"a request may have {self.limits.text_chars:,} characters, and this one has {n_chars:,}"
            )
        return loaded

    def names(self, messages: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """The names of the media of messages, in order, as far as clients gave any."""
        parts = [part for message in messages for part in _parts(message) if part.get("type") not in TEXT_PARTS]
        return [self._name(part.get("file")) for part in parts]

    def _name(self, file: Any) -> str | None:
        if not isinstance(file, Mapping):
            return None
        identifier, name = file.get("file_id"), file.get("filename")
        if isinstance(identifier, str):
            return self.files.get(identifier).name
        return name if isinstance(name, str) else None

    async def _message(self, message: Mapping[str, Any], place: str, left: "_Left") -> dict[str, Any]:
        content = message.get("content")
        if message.get("role") == "developer":
            message = {**message, "role": "system"}
        if not isinstance(content, list):
            return dict(message)
        parts = []
        for index, part in enumerate(content):
            where = f"{place}.content[{index}]"
            try:
                parts.append(await self._part(part, where, left))
            except FastAVError as error:
                if error.message.startswith(where):
                    raise
                raise type(error)(f"{where}: {error.message}", error.hint) from None
        return {**message, "content": parts}

    async def _part(self, part: Mapping[str, Any], place: str, left: "_Left") -> dict[str, Any]:
        kind = part.get("type")
        if kind in TEXT_PARTS:
            field = "refusal" if kind == "refusal" else "text"
            if not isinstance(text := part.get(field), str):
                raise InvalidRequest(f"{place} has no text")
            _refuse_others(part, ("type", field, *TEXT_NOTES), place)
            return {"type": "text", "text": text}
        if kind in URL_PARTS:
            source = _fields(part, kind, place, ("url", "detail", "format"))
            if source.get("detail") not in (None, "auto"):
                raise InvalidRequest(f"{place}: detail has no effect here", "leave it out")
            return {"type": URL_PARTS[kind], URL_PARTS[kind]: await self._load(source.get("url"), left)}
        if kind == "input_audio":
            source = _fields(part, kind, place, ("data", "format"))
            return {"type": "audio", "audio": await asyncio.to_thread(_decoded, source.get("data"))}
        if kind == "file":
            source = _fields(part, kind, place, ("file_id", "file_data", "filename"))
            if source.get("file_data") is not None:
                data = await self._load(source["file_data"], left)
                return {"type": (one := _kind_of("", data)), one: data}
            if not isinstance(source.get("file_id"), str):
                raise InvalidRequest(f"{place} has neither file_id nor file_data")
            stored = self.files.get(source["file_id"])
            return {"type": (one := _kind_of(stored.kind, stored.data)), one: stored.data}
        known = ", ".join(("text", *URL_PARTS, "input_audio", "file"))
        raise InvalidRequest(
            f"{place} has the type {str(kind)[:40]!r}, which this server does not know", f"use {known}"
        )

    async def _load(self, url: Any, left: "_Left") -> bytes:
        """The bytes behind a URL."""
        if not isinstance(url, str) or not url:
            raise InvalidRequest("the url is missing")
        scheme = url.partition(":")[0].lower()
        if scheme == "file":
            return left.take(await asyncio.to_thread(self._read, url))
        if scheme not in ("data", "http", "https"):
            raise UnreadableMedia(
                f"a URL of {scheme[:20]!r} is not loaded" if ":" in url else "a path is not a URL",
                "send a data: URL, or upload the file to /v1/files",
            )
        if scheme != "data" and self.domains is None:
            raise UnreadableMedia(
                "this server loads nothing from other hosts",
                "send a data: URL or an upload; --allow-domains of the server allows hosts",
            )
        if scheme == "data":
            return (await asyncio.to_thread(source_of, url, self.policy)).data
        return left.take((await _aside(partial(source_of, url, self.policy), self.downloads)).data)

    def _read(self, url: str) -> bytes:
        """A file below the root.  The same error for a file that is missing and one that is not allowed."""
        error = UnreadableMedia("this file:// URL is not loaded", "the server reads files below its --media-root alone")
        if self.root is None:
            raise error
        try:
            path = source_of(url, MediaPolicy(urls=False)).path
            root = self.root.resolve(strict=True)
            if path is None or not (real := path.resolve(strict=True)).is_relative_to(root):
                raise error
            with open(_open_below(root, real.relative_to(root)), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise error
                data = file.read(self.limits.body_bytes + 1)
        except (OSError, ValueError, RuntimeError, MediaError):  # RuntimeError: links in a circle
            raise error from None
        if len(data) > self.limits.body_bytes:
            raise UnreadableMedia(f"the file is larger than {self.limits.body_bytes:,} bytes")
        return data


class _Left:
    """The bytes that a request may still load from URLs."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size

    def take(self, data: bytes) -> bytes:
        """Count some.  Raises: UnreadableMedia if there are too many."""
        self._left -= len(data)
        if self._left < 0:
            raise UnreadableMedia(f"the media behind the URLs of a request may have {self._size:,} bytes together")
        return data


async def _aside(work: Callable[[], Any], places: asyncio.Semaphore) -> Any:
    """The result of some work in a thread that the end of the process does not wait for.

    places: one is held until the thread ends, also if nobody waits for it any more.
    """
    await places.acquire()
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        places.release()
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def run() -> None:
        result = error = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    Thread(target=run, name="fastav-serve-download", daemon=True).start()
    return await done


def _open_below(root: Path, path: Path) -> int:
    """Open a file below a folder without following any link, so that a link made since the check leads nowhere."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for index, part in enumerate(path.parts, 1):
        flags = os.O_DIRECTORY if index < len(path.parts) else os.O_NONBLOCK  # does not wait for a pipe's writer
        try:
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | flags, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor


def _check(messages: Sequence[Mapping[str, Any]], limits: Limits) -> None:
    """Check the form of messages before anything is loaded.  Raises: InvalidRequest."""
    media = 0
    for index, message in enumerate(messages):
        place, content = f"messages[{index}]", message.get("content")
        _refuse_others(message, MESSAGE_FIELDS, place)
        if not isinstance(content, str | list | None):
            raise InvalidRequest(f"{place}.content must be a text or a list of parts")
        for number, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                raise InvalidRequest(f"{place}.content[{number}] has no type", "such as text or video_url")
            media += part["type"] not in TEXT_PARTS
    if media > limits.media:
        raise InvalidRequest(f"a request may have {limits.media} media, and this one has {media}")


def _refuse_others(item: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    """Raise InvalidRequest for fields that would have no effect."""
    for name, value in item.items():
        if name not in known and value is not None:
            raise InvalidRequest(f"{place} has {name[:40]!r}, which would have no effect here", "leave it out")


def _fields(part: Mapping[str, Any], kind: str, place: str, known: Sequence[str]) -> Mapping[str, Any]:
    """The object of a part.  Raises: InvalidRequest for what would have no effect."""
    source = part.get(kind)
    if isinstance(source, str) and kind in URL_PARTS:
        source = {"url": source}
    if not isinstance(source, Mapping):
        raise InvalidRequest(f"{place}.{kind} must be an object")
    _refuse_others(part, ("type", kind, "uuid", *TEXT_NOTES), place)
    _refuse_others(source, known, place)
    return source


def _decoded(data: Any) -> bytes:
    if not isinstance(data, str):
        raise InvalidRequest("the data are missing", "send base64")
    try:
        return b64decode(data, validate=True)
    except (Base64Error, ValueError):
        raise UnreadableMedia("the data are not base64") from None


def _kind_of(declared: str, data: bytes) -> str:
    """What kind of medium a file is: as it was declared, else by how it begins; a video if that says nothing."""
    if (kind := declared.partition("/")[0]) in ("video", "audio", "image"):
        return kind
    if data[:4] == b"RIFF":
        return {b"WAVE": "audio", b"WEBP": "image"}.get(data[8:12], "video")
    if data[4:8] == b"ftyp" and data[8:11] in (b"M4A", b"M4B"):
        return "audio"
    return next((kind for kind, starts in SIGNATURES.items() if data.startswith(starts)), "video")


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []
