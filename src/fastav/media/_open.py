"""Opening files. Only this module turns FFmpeg's errors into fastav's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any, TypeVar

from fastav.errors import UnreadableMedia, reason_of
from fastav.media._pictures import check_picture
from fastav.media._pyav import av
from fastav.media._source import Source

MAX_SCAN_SECONDS = 600.0
"""Tracks up to this duration are scanned or decoded entirely; longer ones are read with seeks."""

MAX_SIDE = 16_384
"""Maximum width and height of frames, in pixels."""

MAX_BYTES = 2**32
"""Maximum size of a single read."""

# FFmpeg renders text as video and follows playlists to other files; a clip is neither
NOT_MEDIA = frozenset({"tty", "ansi", "bin", "hls", "concat", "dash", "imf", "ffmetadata"})

AnyStream = TypeVar("AnyStream", bound="av.stream.Stream")


class MediaWarning(UserWarning):
    """A clip that can be used, but is not as its file says."""


@contextmanager
def open_container(source: Source) -> "Iterator[av.container.InputContainer]":
    """The file as a container, which is closed at the end of the block.

    Raises: UnreadableMedia if the file is missing, not media or truncated, or if FFmpeg fails inside the block.
    """
    source.check()
    failure = av.error.FFmpegError
    try:
        with _container(source) as container:
            yield container
    except failure as error:
        reason = error.strerror or reason_of(error)
        raise UnreadableMedia(f"{source.name} cannot be read: {reason}", "is the file complete?") from error


def _container(source: Source) -> "av.container.InputContainer":
    # with "file:" a name such as "concat:a|b" stays a name; the whitelist forbids the network, and for clips in memory
    # also other files
    file = source.stream() if source.path is None else f"file:{source.path}"
    options = {"protocol_whitelist": "none" if source.path is None else "file"}
    if source.formats is not None:
        options["format_whitelist"] = ",".join(sorted(source.formats))
    check_picture(source)
    try:
        container = av.open(file, mode="r", options=options, **_text_options())
    except av.error.InvalidDataError as error:
        raise _not_media(source) from error
    except av.error.ArgumentError as error:
        if source.formats is None:
            raise
        message = f"{source.name} is not of a format that is allowed here"
        raise UnreadableMedia(message, "expected a usual video, audio or picture file") from error
    if container.format.name in NOT_MEDIA:
        container.close()
        raise _not_media(source)
    if source.max_pixels is not None:
        _limit_pixels(source, container)
    return container


def _limit_pixels(source: Source, container: "av.container.InputContainer") -> None:
    """Refuse frames that are too large by the file's header; later ones fail to decode."""
    try:
        for stream in container.streams.video:
            if stream.codec_context is not None:
                source.check_pixels(stream.codec_context.width, stream.codec_context.height)
                stream.codec_context.options = {"max_pixels": str(source.max_pixels)}
    except UnreadableMedia:
        container.close()
        raise


def select_stream(stream: AnyStream) -> AnyStream:
    """The stream, set up for threaded decoding; all other streams of its container are skipped."""
    for other in stream.container.streams:
        other.discard = av.stream.Discard.default if other.index == stream.index else av.stream.Discard.all
    stream.codec_context.thread_type = "AUTO"
    return stream


def declared_seconds(container: "av.container.InputContainer", stream: "av.stream.Stream") -> float | None:
    """The duration of the track that the file declares: in its header, in Matroska's tag, or for the container."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag is None:
        return container_seconds(container)
    hours, minutes, seconds = map(float, tag.groups())
    return hours * 3600 + minutes * 60 + seconds


def container_seconds(container: "av.container.InputContainer") -> float | None:
    """The duration of the file that its container declares."""
    return None if container.duration is None else container.duration / 1e6


def tolerance(seconds: float) -> float:
    """The error of a declared duration that is still accepted, in seconds."""
    return max(0.5, 0.01 * seconds)


def check_bytes(size: int, what: str, hint: str) -> None:
    """Refuse a read that would return more than `MAX_BYTES`."""
    if size > MAX_BYTES:
        raise UnreadableMedia(f"{what} would take {size / 1e9:.1f} GB; the limit is {MAX_BYTES / 1e9:.1f} GB", hint)


def _not_media(source: Source) -> UnreadableMedia:
    if source.head(8)[4:] == b"ftyp":
        message = f"{source.name} is an MP4 whose index (moov) is missing or damaged"
        return UnreadableMedia(message, "the file is cut short: copy or record it again")
    return UnreadableMedia(f"{source.name} is not a media file that FFmpeg can read", "expected video or audio")


@cache
def _text_options() -> dict[str, Any]:
    """The option to replace invalid UTF-8 in metadata; PyAV 19 always does so, and no longer accepts the option."""
    return {"metadata_errors": "replace"} if int(version("av").partition(".")[0]) < 19 else {}
