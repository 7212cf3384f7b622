"""Requests: what a model is asked, as one clip and a question or as chat messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from fastav.errors import FastAVError
from fastav.formatting import plural
from fastav.media import Clip, MediaPolicy
from fastav.media.policy import OPEN
from fastav.messages import Kind, Media, Message, Use, is_conversation, messages_of


@dataclass(frozen=True, slots=True, init=False)
class Request:
    """What a model is asked: a question about a clip, or a conversation.

    clip, question: a `Clip`, or anything that `Clip.open` opens, such as a path; and a text. messages: instead of
    these, chat messages as for `fastav.messages.messages_of`.
    use: which tracks of a clip are shown: `auto` uses those that it has; the others require theirs.
    tools: descriptions of tools, for the chat template of a model that takes them.
    policy: which files and URLs `messages` may name.

    Raises: FastAVError, MediaError for anything that is missing or cannot be opened; errors of messages have the place.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]

    def __init__(
        self,
        *,
        clip: Any = None,
        question: Any = None,
        messages: Any = None,
        use: Use | str = Use.AUTO,
        tools: Sequence[Mapping[str, Any]] | None = None,
        policy: MediaPolicy = OPEN,
    ) -> None:
        if messages is None:
            messages = _about_one_clip(clip_of(clip), question_of(question), Use(use))
        elif clip is not None or question is not None:
            raise FastAVError(
                "a request has messages, or a clip and a question, not both", "put the clip into a message"
            )
        object.__setattr__(self, "messages", messages_of(messages, use=Use(use), policy=policy))
        object.__setattr__(self, "tools", tuple(tools or ()))

    @property
    def media(self) -> tuple[Media, ...]:
        """The clips, sounds and images, in order."""
        return tuple(media for message in self.messages for media in message.media)

    @property
    def text(self) -> str:
        """The texts of all messages, one per line."""
        return "\n".join(message.text for message in self.messages)

    @property
    def tracks(self) -> tuple[bool, bool]:
        """Whether any medium shows a video track or an image, and whether any plays an audio track.

        Raises: MissingTrack if a clip lacks a track that `use` requires.
        """
        tracks = [media.tracks for media in self.media]
        return any(video for video, _ in tracks), any(audio for _, audio in tracks)

    @property
    def clip(self) -> Clip:
        """The clip of a request that has one.  Raises: FastAVError if it has none or several."""
        return self._only.clip

    @property
    def use(self) -> Use:
        """Which tracks of the clip are shown.  Raises: as `clip`."""
        return self._only.use

    @property
    def question(self) -> str:
        """The text of the last message."""
        return self.messages[-1].text

    @property
    def _only(self) -> Media:
        if len(self.media) != 1:
            raise FastAVError(f"the request has {plural(len(self.media), 'clip')}, not one", "read its `media`")
        return self.media[0]


def _about_one_clip(clip: Clip, question: str, use: Use) -> tuple[Message, ...]:
    is_sound = use is Use.AUDIO or (use is Use.AUTO and clip.video is None)
    media = Media(kind=Kind.AUDIO if is_sound else Kind.VIDEO, clip=clip, use=use)
    return (Message(role="user", content=(media, question)),)


def clip_of(clip: Any) -> Clip:
    """A `Clip` as it is; anything else, such as a path, is opened by `Clip.open`.  Raises: MediaError, FastAVError."""
    if isinstance(clip, Clip):
        return clip
    if not (isinstance(clip, str | PathLike | bytes) or hasattr(clip, "read")):
        raise FastAVError(
            f"a clip must be a fastav.Clip or a path, got {type(clip).__name__}",
            "use fastav.Clip.open or fastav.Clip.from_arrays",
        )
    return Clip.open(clip)


def question_of(question: Any) -> str:
    """The question, checked.  Raises: FastAVError if it is not text, or blank."""
    if not isinstance(question, str):
        raise FastAVError(f"a question must be a string, got {type(question).__name__}")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise FastAVError("the question is not text: it contains bytes that are not UTF-8") from None
    if not question.strip():
        raise FastAVError("the question is empty", "ask something about the clip")
    return question


def request_of(clip: Any, question: Any, use: Use, tools: Sequence[Mapping[str, Any]] | None = None) -> Request:
    """A `Request` as it is, or a new one from messages, or from a clip and a question.  Raises: as `Request`."""
    if isinstance(clip, Request):
        if question is not None:
            raise FastAVError("a Request has its own question, but you also passed another", "pass one of them")
        if use is not Use.AUTO or tools is not None:
            raise FastAVError(
                "a Request has its own use and tools, but you also passed some", "put them into the Request"
            )
        return clip
    if not is_conversation(clip):
        return Request(clip=clip_of(clip), question=question_of(question), use=use, tools=tools)
    if question is not None:
        raise FastAVError("messages have their own question, but you also passed one", "put it into the last message")
    return Request(messages=clip, use=use, tools=tools)


def is_list(value: Any) -> bool:
    """Whether an argument is a list or tuple of several values, and not one conversation."""
    return isinstance(value, list | tuple) and not is_conversation(value)


def requests_of(
    clips: Any, questions: Any, use: Use, tools: Sequence[Mapping[str, Any]] | None = None
) -> list[Request]:
    """Requests from a list of requests or conversations, or from clips and questions: lists of equal length, or one
    value for all.

    A clip that serves all questions is opened once.
    Raises: FastAVError for lists of different lengths; otherwise as `Request`.
    """
    if not is_list(clips):
        clips = [clips if isinstance(clips, Request) or is_conversation(clips) else clip_of(clips)] * len(questions)
    if not is_list(questions):
        questions = [questions] * len(clips)
    if len(clips) != len(questions):
        raise FastAVError(
            f"{plural(len(clips), 'clip')} and {plural(len(questions), 'question')} cannot be paired",
            "pass as many clips as questions, or one clip or one question for all",
        )
    return [request_of(clip, question, use, tools) for clip, question in zip(clips, questions, strict=True)]
