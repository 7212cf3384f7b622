"""Chat messages in transformers' multimodal format, checked, with their media opened."""

import os
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, cast

import numpy as np

from fastav.errors import FastAVError, MediaError, MissingTrack, UnreadableMedia, reason_of
from fastav.formatting import plural
from fastav.media import Clip, MediaPolicy
from fastav.media.clip import array_of
from fastav.media.policy import OPEN
from fastav.registry import unknown_name

ROLES = ("system", "developer", "user", "assistant", "tool")
ANSWERABLE = ("user", "tool")  # roles of a last message that a model can answer


class Use(StrEnum):
    """Which tracks of a clip a request passes to the model."""

    AUTO = "auto"
    BOTH = "both"
    VIDEO = "video"
    AUDIO = "audio"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise unknown_name("use of a clip", str(value), cls)


class Kind(StrEnum):
    """What a medium is in the prompt: a clip with or without its sound, sound alone, or a picture."""

    VIDEO = "video"
    AUDIO = "audio"
    IMAGE = "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """A clip, a sound or an image in a message.

    use: which tracks of a clip are shown; `auto` shows those that it has. place: where it is in the messages, for
    errors; empty if the request has no other medium.
    """

    kind: Kind
    clip: Clip
    use: Use = Use.AUTO
    place: str = field(default="", compare=False)

    @property
    def tracks(self) -> tuple[bool, bool]:
        """Whether the video track is used, and whether the audio track is.

        Raises: MissingTrack if the clip lacks a track that `use` requires.
        """
        has_video, has_audio = self.clip.video is not None, self.clip.audio is not None
        needs_video, needs_audio = self.use in (Use.BOTH, Use.VIDEO), self.use in (Use.BOTH, Use.AUDIO)
        if needs_video and not has_video:
            raise MissingTrack(f"{self.name} has no video track", "ask with use='audio' (--use audio)")
        if needs_audio and not has_audio:
            raise MissingTrack(f"{self.name} has no audio track", "ask with use='video' (--use video)")
        return (has_video, has_audio) if self.use is Use.AUTO else (needs_video, needs_audio)

    @property
    def aligned_clip(self) -> Clip:
        """The clip, with both tracks aligned to its start (`Clip.aligned`) if both are used.

        For families that match video and sound by time. Other families take the tracks and their start times as they
        are.
        Raises: MissingTrack, UnreadableMedia.
        """
        return self.clip.aligned() if all(self.tracks) else self.clip

    @property
    def name(self) -> str:
        """The clip's name, with its place in the messages."""
        return f"{self.place}: {self.clip.name}" if self.place else self.clip.name

    @property
    def seconds(self) -> float:
        """The length of the longest track that is used; 0 for an image.  Raises: MissingTrack."""
        video, audio = self.tracks
        tracks = (video and self.clip.video, audio and self.clip.audio)
        return 0.0 if self.kind is Kind.IMAGE else max((track.duration for track in tracks if track), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation.

    content: texts and media, in order; a string if the message was written so. fields: the message's other fields, such
    as `tool_calls`, for the chat template.
    """

    role: str
    content: str | tuple[str | Media, ...]
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def parts(self) -> tuple[str | Media, ...]:
        """The texts and media."""
        return (self.content,) if isinstance(self.content, str) else self.content

    @property
    def media(self) -> tuple[Media, ...]:
        """The media, in order."""
        return tuple(part for part in self.parts if isinstance(part, Media))

    @property
    def text(self) -> str:
        """The texts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))

    def to_dict(self, stand_ins: Callable[[Media], Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """The message for a chat template.  stand_ins: the content parts in place of a medium."""
        content: Any = self.content
        if not isinstance(content, str):
            parts = cast("tuple[str | Media, ...]", content)
            content = [
                entry
                for part in parts
                for entry in ([{"type": "text", "text": part}] if isinstance(part, str) else stand_ins(part))
            ]
        return {"role": self.role, **self.fields, "content": content}


def is_conversation(value: Any) -> bool:
    """Whether an argument is a list of messages, rather than a list of clips, requests or conversations."""
    return isinstance(value, list | tuple) and any(
        isinstance(one, Mapping | Message) for one in cast("list[Any]", value)
    )


def messages_of(messages: Any, *, use: Use = Use.AUTO, policy: MediaPolicy = OPEN) -> tuple[Message, ...]:
    """Messages in transformers' chat format, checked, with their media opened.

    messages: a list of `{"role": ..., "content": ...}`, where the content is text, or a list of parts of type "text",
    "video", "audio" and "image". A part names its medium under its own type, or under "path", "url" or "base64": a
    path, a URL, bytes, a file object, a `Clip`, a PIL image, or an array or tensor: frames uint8 [frames, height,
    width, 3] with their "fps", an image uint8 [height, width, 3], samples in [-1, 1] with their "sampling_rate".
    A video is shown with its sound, if it has any and the model takes sound, unless the part has "use": "video", or a
    part of type "audio" in the same message has a sound of its own. An audio part that names the video's source, or
    none, means that video's sound. Messages that are `Message` objects are taken as they are.
    use: of videos whose part names none. policy: what may be opened.

    Raises: FastAVError, MediaError: each with the place in the messages, as in `messages[0].content[1]`.
    """
    if not isinstance(messages, list | tuple):
        raise FastAVError(f"messages must be a list of messages, got {type(messages).__name__}", _EXAMPLE)
    conversation = tuple(
        message if isinstance(message, Message) else _message(message, f"messages[{index}]", use, policy)
        for index, message in enumerate(cast("list[Any]", messages))
    )
    if not conversation:
        raise FastAVError("there are no messages", _EXAMPLE)
    last = conversation[-1]
    if last.role not in ANSWERABLE:
        raise FastAVError(
            f"the last message is of the role {last.role!r}, which a model does not answer",
            "end with a message of the role 'user'",
        )
    if not last.media and not last.text.strip():
        raise FastAVError("the last message is empty", "ask something, or add a clip")
    return conversation


_EXAMPLE = (
    'for example [{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "?"}]}]'
)


def _message(message: Any, place: str, use: Use, policy: MediaPolicy) -> Message:
    if not isinstance(message, Mapping):
        raise FastAVError(f"{place} must be an object with role and content, got {type(message).__name__}", _EXAMPLE)
    fields = dict(cast("Mapping[str, Any]", message))
    role, content = fields.pop("role", None), fields.pop("content", None)
    if not isinstance(role, str):
        raise FastAVError(f"{place} has no role", f"write one of {', '.join(ROLES)}")
    if role not in ROLES:
        raise _placed(unknown_name("role", role, ROLES), place)
    if content is None and not fields:
        raise FastAVError(f"{place} has no content", "write a text, or a list of parts")
    if content is None or isinstance(content, str):
        return Message(role=role, content=_text(content or "", place), fields=fields)
    if not isinstance(content, list | tuple):
        raise FastAVError(f"{place}.content must be text or a list of parts, got {type(content).__name__}")
    parts = [_part(part, f"{place}.content[{index}]") for index, part in enumerate(cast("list[Any]", content))]
    return Message(role=role, content=_opened(parts, use, policy), fields=fields)


class _Part(NamedTuple):
    """A checked part.  kind: None for text."""

    kind: Kind | None
    fields: Mapping[str, Any]
    place: str

    @property
    def source(self) -> Any:
        """What the part shows or plays; None if it does not say."""
        names = () if self.kind is None else _sources(self.kind.value)
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), None)

    def has_source_of(self, other: "_Part") -> bool:
        """Whether two parts name the same file or object."""
        one, two = self.source, other.source
        if isinstance(one, str | os.PathLike) and isinstance(two, str | os.PathLike):
            return os.fspath(cast("str | os.PathLike[str]", one)) == os.fspath(cast("str | os.PathLike[str]", two))
        return one is two


def _part(part: Any, place: str) -> _Part:
    """A part of a message, checked."""
    if not isinstance(part, Mapping):
        raise FastAVError(f"{place} must be an object with a type", 'such as {"type": "text", "text": "..."}')
    fields = dict(cast("Mapping[str, Any]", part))
    kind = fields.get("type")
    if not isinstance(kind, str):
        raise FastAVError(f"{place} has no type", f"write one of {', '.join(('text', *Kind))}")
    if kind == "text":
        if not isinstance(text := fields.get("text"), str):
            raise FastAVError(f"{place} has no text", 'write {"type": "text", "text": "..."}')
        return _Part(None, {"text": _text(text, place)}, place)
    if kind not in set(Kind):
        raise _placed(unknown_name("type of part", kind, ["text", *Kind]), place)
    if len(named := [name for name in _sources(kind) if fields.get(name) is not None]) > 1:
        raise FastAVError(f"{place} names its medium twice, under {' and '.join(named)}", "leave one of them")
    if kind != Kind.VIDEO and fields.get("use") is not None:
        raise FastAVError(f"{place} is of the type {kind!r}, and only a video has a use", "leave it out")
    checked = _Part(Kind(kind), fields, place)
    is_array = hasattr(checked.source, "__array__") or isinstance(checked.source, list | tuple)
    known = {"type", *_sources(kind), "use", *([_RATES[Kind(kind)]] if is_array and kind != Kind.IMAGE else [])}
    if unknown := [str(name) for name, value in fields.items() if name not in known and value is not None]:
        raise FastAVError(
            f"{place} has {' and '.join(unknown)}, which would have no effect here",
            "leave it out: media are sampled as the model's processor does",
        )
    return checked


_RATES = {Kind.VIDEO: "fps", Kind.AUDIO: "sampling_rate"}  # of arrays


def _sources(kind: str) -> tuple[str, ...]:
    """The fields under which a part can name its medium."""
    return (kind, "path", "url", "base64")


def _opened(parts: Sequence[_Part], use: Use, policy: MediaPolicy) -> tuple[str | Media, ...]:
    """The content of a message: texts, and media whose files are opened.  use: of videos that say nothing about it."""
    with_sound = _videos_with_sound(parts)
    sounds = [part for index, part in enumerate(parts) if part.kind is Kind.AUDIO and index not in with_sound]
    content: list[str | Media] = []
    for index, part in enumerate(parts):
        if part.kind is None:
            content.append(part.fields["text"])
        elif index not in with_sound:
            default = Use.BOTH if index in with_sound.values() else Use.VIDEO if sounds and use is Use.AUTO else use
            content.append(_media(part, default, policy))
    return tuple(content)


def _videos_with_sound(parts: Sequence[_Part]) -> dict[int, int]:
    """The parts that stand for the sound of a video before them, each with the part of that video."""
    pairs: dict[int, int] = {}
    for index, part in enumerate(parts):
        if part.kind is not Kind.AUDIO:
            continue
        videos = [i for i, other in enumerate(parts[:index]) if other.kind is Kind.VIDEO and i not in pairs.values()]
        same = [i for i in videos if part.source is None or part.has_source_of(parts[i])]
        if same:
            pairs[index] = same[-1]
            if parts[same[-1]].fields.get("use", Use.BOTH) == Use.VIDEO:
                raise FastAVError(
                    f"{part.place} is the sound of {parts[same[-1]].place}, whose use is 'video'",
                    "leave one of them out",
                )
    return pairs


def _media(part: _Part, use: Use, policy: MediaPolicy) -> Media:
    """The medium of a part.  use: which tracks of a video are shown, unless the part says so."""
    assert part.kind is not None
    try:
        clip = _clip(part, policy)
        kind = part.kind
        if kind is Kind.VIDEO:
            use = Use(part.fields.get("use", use))
            kind = Kind.AUDIO if use is Use.AUDIO else kind
            clip.require_audio() if kind is Kind.AUDIO else clip.require_video()
        elif kind is Kind.AUDIO:
            clip.require_audio()
            use = Use.AUDIO
        else:
            use = Use.VIDEO
            if (frames := clip.require_video().frames) > 1:
                raise UnreadableMedia(
                    f"{clip.name} is no image: it has {plural(frames, 'frame')}", 'use "type": "video"'
                )
        media = Media(kind=kind, clip=clip, use=use, place=part.place)
        _ = media.tracks
    except FastAVError as error:
        raise _placed(error, part.place) from error.__cause__
    return media


def _clip(part: _Part, policy: MediaPolicy) -> Clip:
    """The clip that a part names.  Raises: FastAVError, MediaError."""
    kind, source = part.kind, part.source
    if source is None:
        raise MediaError("the part names no file", f'write {{"type": "{kind}", "path": "..."}}')
    if isinstance(source, Clip):
        return source
    if "base64" in part.fields and part.fields["base64"] is source:
        return Clip.open(_decoded(source), policy=policy)
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(source, "read"):
        return Clip.open(source, policy=policy)
    if kind is Kind.IMAGE:
        return Clip.from_arrays(frames=_picture(source)[None], name="image")
    array = array_of(source)
    if array.dtype == object or not array.ndim:
        raise MediaError(
            f"a part cannot show a {type(source).__name__}",
            "give a path, a URL, bytes, a file object, a fastav.Clip, an array or a tensor",
        )
    assert kind is not None
    rate = _RATES[kind]
    value: Any = part.fields.get(rate)
    if value is None:
        raise MediaError(f"an array of {kind} needs its {rate}", f'write "{rate}" beside it')
    value = cast(Any, value).item() if isinstance(value, np.generic) else value
    if not isinstance(value, int | float) or (kind is Kind.AUDIO and value % 1):
        what = "number" if kind is Kind.VIDEO else "whole number"
        raise MediaError(f"{rate} must be a {what}, got {value!r}", f'such as "{rate}": {_USUAL[rate]}')
    if kind is Kind.VIDEO:
        return Clip.from_arrays(frames=array, fps=float(value), name="array")
    return Clip.from_arrays(waveform=array, sample_rate=int(value), name="array")


_USUAL = {"fps": 25, "sampling_rate": 16_000}


def _decoded(source: Any) -> bytes:
    """The bytes that base64 stands for; it may have line breaks."""
    try:
        text = source.decode("ascii") if isinstance(source, bytes) else source
        return b64decode("".join(text.split()), validate=True)
    except (ValueError, AttributeError) as error:
        raise UnreadableMedia(
            f"this is no base64: {reason_of(error)}",
            'a data: URL goes under "url", and bytes under the type of the part',
        ) from None


def _picture(image: Any) -> np.ndarray:
    """A picture as uint8 [height, width, 3], as it is meant to be seen."""
    if hasattr(image, "convert") and hasattr(image, "getexif"):  # PIL's
        image = _rgb(image)
    picture = array_of(image)
    if picture.ndim != 3:
        raise UnreadableMedia(f"an image must be uint8 [height, width, 3], got {picture.dtype} {list(picture.shape)}")
    return picture


def _rgb(image: Any) -> Any:
    """A picture of PIL in RGB, turned as its EXIF says.  Raises: UnreadableMedia where PIL would lose most of it."""
    from PIL import ImageOps

    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise UnreadableMedia(f"this is no image: it has {plural(frames, 'frame')}", 'use "type": "video"')
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise UnreadableMedia(
            f"a PIL image of mode {image.mode!r} has no range that is known", "scale it to 0..255 first"
        )
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:  # a file that PIL reads late
        raise UnreadableMedia(f"the image cannot be read: {reason_of(error)}", "is the file complete?") from None


def _text(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FastAVError(f"{place} is not text: it contains bytes that are not UTF-8") from None
    return text


def _placed(error: FastAVError, place: str) -> FastAVError:
    """The error with the place in the messages."""
    return type(error)(f"{place}: {error.message}", error.hint)
