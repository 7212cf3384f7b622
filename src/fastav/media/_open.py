"""Opening files: the only place that turns FFmpeg's errors into ours."""

import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import av
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.stream import Discard, Stream

from fastav.errors import UnreadableMedia, reason_of

WHOLE_SECONDS = 600.0
"""Tracks up to this long are scanned or decoded whole; in longer ones, and only there, reading jumps."""

MAX_SIDE = 16_384
"""Frames wider or higher than this are refused, in pixels."""

MAX_BYTES = 2**32
"""No single read returns more than this."""

# FFmpeg draws text as video, and follows playlists to other files: neither is what "open this clip" means
NOT_MEDIA = frozenset({"tty", "ansi", "bin", "hls", "concat", "dash", "imf", "ffmetadata"})

AnyStream = TypeVar("AnyStream", bound=Stream)


@contextmanager
def opened(path: Path) -> Iterator[InputContainer]:
    """The file as a container, closed on leaving.

    Raises: UnreadableMedia if the file is not there, not media or cut short, or if FFmpeg fails inside the block.
    """
    _check_file(path)
    try:
        with _container(path) as container:
            yield container
    except FFmpegError as error:
        reason = error.strerror or reason_of(error)
        raise UnreadableMedia(f"{path.name} cannot be read: {reason}", "is the file complete?") from error


def _container(path: Path) -> InputContainer:
    # "file:" keeps a name such as "concat:a|b" a name, the whitelist keeps FFmpeg off the network
    options = {"protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{path}", mode="r", options=options, metadata_errors="replace")
    except InvalidDataError as error:
        raise _not_media(path) from error
    if container.format.name in NOT_MEDIA:
        container.close()
        raise _not_media(path)
    return container


def only(stream: AnyStream) -> AnyStream:
    """The stream, set to decode on several threads, with every other stream of its container skipped unread."""
    for other in stream.container.streams:
        other.discard = Discard.default if other.index == stream.index else Discard.all
    stream.codec_context.thread_type = "AUTO"
    return stream


def stated_seconds(container: InputContainer, stream: Stream) -> float | None:
    """How long the file says the track is: by its header, by Matroska's tag for it, or as the whole container."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag is not None:
        hours, minutes, seconds = map(float, tag.groups())
        return hours * 3600 + minutes * 60 + seconds
    return None if container.duration is None else container.duration / 1e6


def check_bytes(size: int, what: str, hint: str) -> None:
    """Refuse a read that would return more than `MAX_BYTES`."""
    if size > MAX_BYTES:
        raise UnreadableMedia(f"{what} would take {size / 1e9:.1f} GB; the limit is {MAX_BYTES / 1e9:.1f} GB", hint)


def _check_file(path: Path) -> None:
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise UnreadableMedia(f"{path} is a directory", "name one media file")
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableMedia(f"{path} is not a regular file", "save the clip to a file first")
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise UnreadableMedia(f"no such file: {path}", "check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UnreadableMedia(f"{path} cannot be opened: {reason}", "check the path and its permissions") from error
    if found.st_size == 0:
        raise UnreadableMedia(f"{path.name} is empty (0 bytes)", "was the download or copy interrupted?")


def _not_media(path: Path) -> UnreadableMedia:
    with path.open("rb") as file:
        is_mp4 = file.read(8)[4:] == b"ftyp"
    if is_mp4:
        message = f"{path.name} is an MP4 whose index (moov) is missing or damaged"
        return UnreadableMedia(message, "the file is cut short: copy or record it again")
    return UnreadableMedia(f"{path.name} is not a media file that FFmpeg can read", "expected video or audio")
