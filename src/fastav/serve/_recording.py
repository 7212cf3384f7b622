"""Clips whose reads are recorded where they are decoded, and clips that replay these reads elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from fastav.errors import UnreadableMedia
from fastav.media import AudioTrack, Clip, VideoTrack
from fastav.messages import Kind, Media, Message, Use
from fastav.request import Request
from fastav.serve._wire import Stack


class UnrecordedRead(RuntimeError):
    """A read of a replayed clip that was not made where the clip was decoded. This is a bug."""


class Budget:
    """Bytes that may still be decoded for a request."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size

    def take(self, size: int) -> None:
        """Count bytes before they are decoded.  Raises: UnreadableMedia if there are too many."""
        self._left -= size
        if self._left < 0:
            raise UnreadableMedia(
                f"the media would take more than {self._size / 1e9:.1f} GB when decoded",
                "use shorter clips, or scale them down",
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedFrames:
    """A source of frames that keeps what is read of it.

    size: bytes of a picture. keep: whether pictures are kept.
    """

    source: Any
    size: int
    budget: Budget
    keep: bool
    pictures: dict[int, np.ndarray] = field(default_factory=dict[int, np.ndarray])
    times: dict[int, float] = field(default_factory=dict[int, float])

    def pick(self, indices: list[int]) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        """See `FrameSource`."""
        new = [index for index in indices if index not in self.pictures]
        self.budget.take(self.size * len(new))
        fresh = zip(new, self.source.pick(new), strict=True) if new else iter(())
        for index in indices:
            if (picture := self.pictures.get(index)) is None:
                _, picture = next(fresh)
                if self.keep:
                    self.pictures[index] = picture
            yield picture
        next(fresh, None)  # lets the source close its file

    def seconds(self, indices: list[int]) -> Float[np.ndarray, " indices"]:
        """See `FrameSource`."""
        seconds = self.source.seconds(indices)
        self.times.update(zip(indices, seconds.tolist(), strict=True))
        return seconds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayedFrames:
    """Frames that were read before.  places: the index of each frame's picture in `pictures`."""

    name: str
    pictures: UInt8[np.ndarray, "frames height width 3"]
    places: dict[int, int]
    times: dict[int, float]

    def pick(self, indices: list[int]) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        """See `FrameSource`."""
        return (self.pictures[self._known(self.places, index)] for index in indices)

    def seconds(self, indices: list[int]) -> Float[np.ndarray, " indices"]:
        """See `FrameSource`."""
        return np.array([self._known(self.times, index) for index in indices], np.float64)

    def _known(self, table: dict[int, Any], index: int) -> Any:
        if index not in table:
            raise UnrecordedRead(f"frame {index} of {self.name} was not read where it was decoded")
        return table[index]


Calls = dict[tuple[Any, ...], Any]
"""What each call of a track's methods gave: by the method's name, the seconds of silence, and the arguments."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class RecordedAudio(AudioTrack):
    """An audio track that keeps what is read of it."""

    budget: Budget
    keep: bool
    calls: Calls = field(default_factory=Calls)

    def read(self, sample_rate: int, spans: Sequence[tuple[int, int]] | None = None) -> Any:
        """See `AudioTrack`."""
        samples = self.duration * sample_rate if spans is None else sum(end - start for start, end in spans)
        self.budget.take(4 * int(samples))
        return self._kept(_read_call(self, sample_rate, spans), AudioTrack.read(self, sample_rate, spans))

    def length(self, sample_rate: int) -> int:
        """See `AudioTrack`."""
        track = replace(self, keep=False)  # the samples that are counted are not sent
        return self._kept(("length", self.silence, sample_rate), AudioTrack.length(track, sample_rate))

    def native(self, channel: int | None = None, max_seconds: float | None = None) -> Any:
        """See `AudioTrack`."""
        seconds = self.duration if max_seconds is None else min(max_seconds, self.duration)
        self.budget.take(int(8 * (1 if channel is not None else self.channels) * seconds * self.sample_rate))
        call = ("native", self.silence, channel, max_seconds)
        return self._kept(call, AudioTrack.native(self, channel, max_seconds))

    def _kept(self, call: tuple[Any, ...], result: Any) -> Any:
        if self.keep or call[0] == "length":
            self.calls[call] = _copied(result)
        return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class ReplayedAudio(AudioTrack):
    """An audio track that was read before."""

    calls: Calls

    def read(self, sample_rate: int, spans: Sequence[tuple[int, int]] | None = None) -> Any:
        """See `AudioTrack`."""
        return self._known(_read_call(self, sample_rate, spans))

    def length(self, sample_rate: int) -> int:
        """See `AudioTrack`."""
        return self._known(("length", self.silence, sample_rate))

    def native(self, channel: int | None = None, max_seconds: float | None = None) -> Any:
        """See `AudioTrack`."""
        return self._known(("native", self.silence, channel, max_seconds))

    def _known(self, call: tuple[Any, ...]) -> Any:
        if call not in self.calls:
            raise UnrecordedRead(f"{call} of {self.source.name} was not read where it was decoded")
        return _copied(self.calls[call])


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedSound:
    """The sound of a track that was read before, which is not here itself."""

    name: str
    sample_rate: int
    seekable: bool

    def frames(self) -> Any:
        """Raises: UnrecordedRead."""
        raise UnrecordedRead(f"the sound of {self.name} is not here")

    def window(self, first: int, stop: int) -> Any:
        """Raises: UnrecordedRead."""
        return self.frames()


def recorded(request: Request, *, budget: Budget, keep: bool) -> Request:
    """The same request with clips whose reads are recorded.  keep: whether frames and sound are."""

    def clip_of(clip: Clip) -> Clip:
        video, audio = clip.video, clip.audio
        if video is not None:
            size = video.width * video.height * 3
            video = replace(video, source=RecordedFrames(source=video.source, size=size, budget=budget, keep=keep))
        if audio is not None:
            audio = RecordedAudio(**_fields(audio), budget=budget, keep=keep)
        return replace(clip, video=video, audio=audio)

    return _with_clips(request, clip_of)


def packed(request: Request, *, reads: bool = True) -> Any:
    """A request whose reads were recorded, as plain data and arrays.

    reads: whether frames and sound are part of it.
    """
    media = list(request.media)
    places = {id(one): index for index, one in enumerate(media)}
    return {
        "media": [
            {"kind": str(one.kind), "use": str(one.use), "place": one.place, "clip": _packed_clip(one.clip, reads)}
            for one in media
        ],
        "messages": [
            {
                "role": message.role,
                "content": message.content
                if isinstance(message.content, str)
                else [part if isinstance(part, str) else places[id(part)] for part in message.content],
                "fields": dict(message.fields),
            }
            for message in request.messages
        ],
        "tools": [dict(tool) for tool in request.tools],
    }


def unpacked(data: Any) -> Request:
    """The request that `packed` gave, with clips that replay its reads."""
    media = [
        Media(kind=Kind(one["kind"]), use=Use(one["use"]), place=one["place"], clip=_unpacked_clip(one["clip"]))
        for one in data["media"]
    ]
    messages = [
        Message(
            role=message["role"],
            content=message["content"]
            if isinstance(message["content"], str)
            else tuple(part if isinstance(part, str) else media[part] for part in message["content"]),
            fields=message["fields"],
        )
        for message in data["messages"]
    ]
    return Request(messages=messages, tools=data["tools"])


def _with_clips(request: Request, clip_of: Callable[[Clip], Clip]) -> Request:
    """A request with other clips."""
    messages = [
        message
        if isinstance(message.content, str)
        else replace(
            message,
            content=tuple(
                replace(part, clip=clip_of(part.clip)) if isinstance(part, Media) else part for part in message.content
            ),
        )
        for message in request.messages
    ]
    return Request(messages=messages, tools=request.tools)


_VIDEO = ("frames", "fps", "duration", "width", "height", "start", "origin")
_AUDIO = ("samples", "sample_rate", "channels", "duration", "start", "silence")


def _packed_clip(clip: Clip, reads: bool) -> Any:
    video, audio = clip.video, clip.audio
    packed: dict[str, Any] = {"name": clip.name, "video": None, "audio": None}
    if video is not None:
        source = video.source
        assert isinstance(source, RecordedFrames)
        kept = source.pictures if reads else {}
        packed["video"] = {
            "track": {name: getattr(video, name) for name in _VIDEO},
            "frames": list(kept),
            "pictures": Stack(list(kept.values()), (video.height, video.width, 3), "|u1"),
            "times": list(source.times.items()),
        }
    if audio is not None:
        assert isinstance(audio, RecordedAudio)
        packed["audio"] = {
            "track": {name: getattr(audio, name) for name in _AUDIO},
            "seekable": audio.source.seekable,
            "calls": [(call, result) for call, result in audio.calls.items() if reads or call[0] == "length"],
        }
    return packed


def _unpacked_clip(data: Any) -> Clip:
    name, video, audio = data["name"], data["video"], data["audio"]
    return Clip(
        name=name,
        video=video
        and VideoTrack(
            **video["track"],
            source=ReplayedFrames(
                name=name,
                pictures=video["pictures"],
                places={frame: place for place, frame in enumerate(video["frames"])},
                times=dict(video["times"]),
            ),
        ),
        audio=audio
        and ReplayedAudio(
            **audio["track"],
            source=ReplayedSound(name=name, sample_rate=audio["track"]["sample_rate"], seekable=audio["seekable"]),
            calls=dict(audio["calls"]),
        ),
    )


def _fields(track: AudioTrack) -> dict[str, Any]:
    return {"source": track.source, **{name: getattr(track, name) for name in _AUDIO}}


def _read_call(track: AudioTrack, sample_rate: int, spans: Sequence[tuple[int, int]] | None) -> tuple[Any, ...]:
    known = None if spans is None else tuple((int(start), int(end)) for start, end in spans)
    return ("read", track.silence, int(sample_rate), known)


def _copied(result: Any) -> Any:
    """A copy, as the caller may change what it gets."""
    if isinstance(result, list):
        return [one.copy() for one in result]
    return result.copy() if isinstance(result, np.ndarray) else result
