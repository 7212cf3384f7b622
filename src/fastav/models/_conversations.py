"""The clip that a conversation shows, and its texts with a place for the clip: for families of one clip per prompt."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastav.errors import MediaError
from fastav.media import Clip
from fastav.messages import Kind, Media, Use
from fastav.request import Request

SOURCES = {"video": ("video", "path", "url"), "audio": ("audio", "path", "url")}
KINDS = (*SOURCES, "text")

Conversation = Sequence[Mapping[str, Any]]
Part = Mapping[str, Any]


def flat(conversation: Conversation, places: Mapping[str, str]) -> list[dict[str, Any]]:
    """The messages with contents that are strings: the clip's place comes first, then the text.

    places: what a message's "video" (with or without its audio) and its "audio" alone become.
    Raises: MediaError for parts of another type, audio alone if the model does not take that, more than one clip, or
    text before the clip that holds the words of its place.
    """
    _clip_parts(conversation)
    messages, marks = [], {place.strip() for place in places.values()}
    for message in conversation:
        text, place = _content(message["content"], places)
        before = "".join(earlier["content"] for earlier in messages)
        if place and (written := [mark for mark in sorted(marks) if mark in before]):
            raise MediaError(
                f"the text before the clip holds {written[0]}, which stands for a clip", "write it differently"
            )
        messages.append({**message, "content": place + text})
    return messages


def only_clip(request: Request) -> Media | None:
    """The clip of a request, with the sound beside it in the same message as its own; None if it has none.

    Raises: MediaError for images and for several clips.
    """
    media = request.media
    for one in media:
        if one.kind is Kind.IMAGE:
            raise MediaError(f"{one.name}: this model takes clips and no images", 'show it as "type": "video"')
    if not media:
        return None
    first, *others = media
    beside = next((message.media for message in request.messages if message.media), ())
    if len(media) == 2 and len(beside) == 2 and (first.kind, others[0].kind) == (Kind.VIDEO, Kind.AUDIO):
        clip = replace(first.clip, audio=others[0].clip.require_audio())
        return Media(kind=Kind.VIDEO, clip=clip, use=Use.BOTH, place=first.place)
    if others:
        raise MediaError(
            f"{others[0].name}: this model takes one clip per prompt, and these messages show several",
            "ask about one clip at a time, or use a model that takes several",
        )
    return first


def media_of(conversation: Conversation, load_audio_from_video: bool | None) -> Media | None:
    """What a conversation shows, None if it is text alone.

    A part of type "video" or "audio" says what under "path", "url", or its own type: a path, a URL, a `Clip`, or an
    array: frames uint8 [frames, height, width, 3] with their "fps", samples with their "sampling_rate". Audio beside a
    video is that video's own unless it says otherwise.
    load_audio_from_video: whether a video is shown with its sound; None: if it has any.

    Raises: MediaError for a part that does not say what it shows; UnreadableMedia; MissingTrack.
    """
    parts = _clip_parts(conversation)
    video, audio = parts.get("video"), parts.get("audio")
    if video is None:
        return None if audio is None else Media(kind=Kind.AUDIO, clip=_clip("audio", audio), use=Use.AUDIO)
    clip, use = _clip("video", video), Use.VIDEO
    clip.require_video()
    if audio is not None:
        use = Use.BOTH
        if _source("audio", audio) is not None and not _same(video, audio):
            clip = replace(clip, audio=_clip("audio", audio).require_audio())
    elif load_audio_from_video or (load_audio_from_video is None and clip.audio is not None):
        use = Use.BOTH
    return Media(kind=Kind.VIDEO, clip=clip, use=use)


def _clip_parts(conversation: Conversation) -> dict[str, Part]:
    """A conversation's part of type "video" and of type "audio", where it has one."""
    parts, where = {}, set()
    for turn, message in enumerate(conversation):
        content = message["content"]
        for part in [] if content is None or isinstance(content, str) else content:
            if part.get("type") in SOURCES:
                where.add(turn)
                if parts.setdefault(part["type"], part) is not part or len(where) > 1:
                    raise MediaError(
                        "a conversation shows one clip, but this one has several parts of video or audio",
                        "ask about one clip at a time, its sound beside it in the same message",
                    )
    return parts


def _content(content: Any, places: Mapping[str, str]) -> tuple[str, str]:
    """A message's text and its clip's place."""
    if content is None or isinstance(content, str):
        return content or "", ""
    kinds = [part.get("type") for part in content]
    if unknown := {str(kind) for kind in kinds} - set(KINDS):
        raise MediaError(f"a message part cannot be of type {', '.join(sorted(unknown))}", "use video, audio and text")
    shown = next((kind for kind in SOURCES if kind in kinds), None)
    if shown and places and shown not in places:
        raise MediaError("this model takes sound only along with a picture", "add the video part")
    return "".join(part["text"] for part in content if part["type"] == "text"), places.get(shown or "", "")


def _source(kind: str, part: Part) -> Any:
    return next((part[key] for key in SOURCES[kind] if part.get(key) is not None), None)


def _same(video: Part, audio: Part) -> bool:
    one, other = _source("video", video), _source("audio", audio)
    paths = isinstance(one, str | os.PathLike) and isinstance(other, str | os.PathLike)
    return os.fspath(one) == os.fspath(other) if paths else one is other


def _clip(kind: str, part: Part) -> Clip:
    source = _source(kind, part)
    if source is None:
        raise MediaError(
            f"a part of type {kind} does not say what it shows",
            f'write {{"type": "{kind}", "path": "clip.mp4"}}, or render with tokenize=False and give the clip later',
        )
    if isinstance(source, Clip):
        return source
    if isinstance(source, str | os.PathLike):
        return Clip.open(source)
    pace = "fps" if kind == "video" else "sampling_rate"
    if part.get(pace) is None:
        raise MediaError(
            f"an array of {kind} needs its {pace}", f'write "{pace}" beside it, or give a path or a fastav.Clip'
        )
    if kind == "video":
        return Clip.from_arrays(frames=np.asarray(source), fps=part[pace])
    return Clip.from_arrays(waveform=np.asarray(source), sample_rate=part[pace])
