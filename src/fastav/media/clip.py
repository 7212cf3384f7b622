"""A clip: the video and audio tracks of one file, or of arrays."""

import warnings
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal

import numpy as np

from fastav.errors import MissingTrack, UnreadableMedia, reason_of
from fastav.media._frames import ArrayFrames
from fastav.media._open import MediaWarning, container_seconds, open_container, tolerance
from fastav.media._pyav import av
from fastav.media._source import Source, source_of
from fastav.media._webp import is_animated_webp, probe_webp
from fastav.media.audio import AudioTrack, audio_of_array, probe_audio
from fastav.media.policy import OPEN, MediaPolicy
from fastav.media.video import VideoTrack, probe_video

MAX_OFFSET = 6 * 3600.0
"""Maximum seconds by which one track may start after the other."""

FORMATS_WITH_DURATION = frozenset(["mov", "matroska", "avi", "wav", "flac", "mp3", "aiff"])
"""Formats whose header declares the duration of each track, or of the file if its tracks end together."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """A video with or without sound, or sound alone.

    A clip keeps no file open: each read of a track opens the file again, so clips are cheap and thread-safe. A clip
    starts with the earlier of its tracks; each track knows its own start.
    """

    name: str
    video: VideoTrack | None
    audio: AudioTrack | None

    @classmethod
    def open(
        cls,
        source: Any,
        *,
        policy: MediaPolicy = OPEN,
    ) -> "Clip":
        """Open a media file.

        A few frames are decoded; a clip of up to 10 minutes is also scanned for the times of its frames. A cover
        picture is not a video track. If there are several tracks, FFmpeg's choice is used. A file that ends much
        earlier than it declares is opened with a `MediaWarning`.

        source: a path, a URL (`file://`, `http://`, `https://`, `data:`), the bytes of a media file, or a file opened
        in binary mode, which is read to its end. Everything but a file on disk is kept in memory. policy: what may be
        opened, and how much is loaded. Raises: UnreadableMedia if the source is missing, forbidden, not media,
        truncated, without a track, or too large.
        """
        return _open_clip(source_of(source, policy))

    @classmethod
    def from_arrays(
        cls,
        *,
        frames: Any = None,
        fps: float | int = 25.0,
        waveform: Any = None,
        sample_rate: int | None = None,
        name: str = "array",
    ) -> "Clip":
        """A clip of RGB frames, of sound in [-1, 1] at `sample_rate` Hz, or of both.

        frames: uint8 [frames, height, width, 3]. waveform: float [channels, samples] or [samples]. Each is an array, or
        a torch tensor on any device. Raises: UnreadableMedia if both are missing, an array is empty or misshapen, or
        `sample_rate` is missing.
        """
        if frames is None and waveform is None:
            raise UnreadableMedia("a clip needs frames or a waveform, got neither", "pass one of them")
        return cls(
            name=name,
            video=None if frames is None else _video_of_array(array_of(frames), fps),
            audio=None if waveform is None else audio_of_array(array_of(waveform), sample_rate, name),
        )

    @property
    def duration(self) -> float:
        """Seconds from the start of the clip to the end of its longest track."""
        return max(track.start + track.duration for track in (self.video, self.audio) if track is not None)

    def aligned(self) -> "Clip":
        """The clip with both tracks from its start on, as a player shows it.

        Before sound that starts late there is silence; before a video that starts late its first picture is repeated.
        Raises: UnreadableMedia if the tracks start so far apart that the times of the file must be wrong.
        """
        starts = [track.start for track in (self.video, self.audio) if track is not None]
        if max(starts) > MAX_OFFSET:
            message = f"the tracks of {self.name} start {max(starts):.0f} s apart"
            raise UnreadableMedia(message, "its times are damaged: record it again, or show one track alone")
        if not any(starts):
            return self
        video, audio = self.video, self.audio
        return replace(
            self,
            video=None if video is None else video.from_start(),
            audio=None if audio is None else audio.from_start(),
        )

    def require_video(self) -> VideoTrack:
        """The video track. Raises: MissingTrack if there is none."""
        if self.video is None:
            raise MissingTrack(f"{self.name} has no video track", "use a clip with video, or leave video out")
        return self.video

    def require_audio(self) -> AudioTrack:
        """The audio track. Raises: MissingTrack if there is none."""
        if self.audio is None:
            raise MissingTrack(f"{self.name} has no audio track", "use a clip with sound, or leave audio out")
        return self.audio


def _open_clip(source: Source) -> Clip:
    """The clip of a source.  Raises: UnreadableMedia."""
    source.check()
    if is_animated_webp(source.head(32)):
        clip = Clip(name=source.name, video=probe_webp(source), audio=None)
        _warn_if_truncated(source, clip, None)
        return clip
    with open_container(source) as container:
        video, audio = _choose_stream(container, "video"), _choose_stream(container, "audio")
        has_header = container.format.name.partition(",")[0] in FORMATS_WITH_DURATION
        declared = container_seconds(container) if has_header else None
    if video is None and audio is None:
        message = f"{source.name} has neither video nor audio that can be decoded"
        raise UnreadableMedia(message, "expected a video or audio file")
    sound = None if audio is None else probe_audio(source, audio)
    audio_start = inf if sound is None else sound.start
    picture = None if video is None else probe_video(source, video, audio_start)
    if sound is not None:
        sound = replace(sound, start=0.0 if picture is None else max(0.0, audio_start - picture.origin))
    clip = Clip(name=source.name, video=picture, audio=sound)
    _warn_if_truncated(source, clip, declared)
    return clip


def _warn_if_truncated(source: Source, clip: Clip, declared: float | None) -> None:
    """Warn if a file has much less than it declares, in bytes or seconds."""
    message = None
    if (truncated := source.truncation()) is not None:
        have, size = (n // 1000 for n in truncated)
        message = f"{source.name} has {have} of {size} kB: it is cut short"
    elif declared is not None and declared - clip.duration > tolerance(declared):
        # one track can be shorter than the file, but not both
        what = "sound" if clip.video is None else "video" if clip.audio is None else "video and sound"
        ends = "end" if clip.video and clip.audio else "ends"
        reason = f"the {what} of {source.name} {ends} at {clip.duration:.1f} s, but the file says {declared:.1f} s"
        message = f"{reason}: it may be cut short"
    if message is not None:
        warnings.warn(MediaWarning(message), stacklevel=4)


def _choose_stream(container: "av.container.InputContainer", kind: Literal["video", "audio"]) -> int | None:
    """The index of the stream to use: FFmpeg's choice, unless that is a cover picture or has no decoder."""
    disposition = av.stream.Disposition
    pictures = disposition.attached_pic | disposition.timed_thumbnails

    def is_usable(stream: "av.stream.Stream") -> bool:
        return stream.codec_context is not None and not stream.disposition & pictures

    candidates = [container.streams.best(kind), *(s for s in container.streams if s.type == kind)]
    return next((s.index for s in candidates if s is not None and is_usable(s)), None)


def array_of(values: Any) -> np.ndarray:
    """A numpy array from any array or from a tensor on any device, with a gradient, or in bfloat16."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if "bfloat16" in str(values.dtype):  # numpy has no bfloat16
            values = values.float()
        values = values.numpy()
    try:
        return np.asarray(values)
    except ValueError as error:  # such as lists of different lengths
        raise UnreadableMedia(f"this is no array: {reason_of(error)}", "give an array or a tensor") from None


def _video_of_array(frames: np.ndarray, fps: float | int) -> VideoTrack:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        description = f"{frames.dtype} {list(frames.shape)}"
        raise UnreadableMedia(f"frames must be uint8 [frames, height, width, 3], got {description}", _advice(frames))
    if not 0 < fps < inf:
        raise UnreadableMedia(f"fps must be positive and finite, got {fps}", "25 is usual")
    count, height, width, _ = frames.shape
    source = ArrayFrames(pictures=frames, fps=float(fps))
    return VideoTrack(frames=count, fps=float(fps), duration=count / fps, width=width, height=height, source=source)


def _advice(frames: np.ndarray) -> str:
    if frames.ndim == 4 and frames.shape[1] == 3 and frames.shape[3] != 3:
        return "put the channels last: frames.transpose(0, 2, 3, 1), or permute of a tensor"
    return "scale them to 0..255 first" if frames.dtype.kind == "f" else "convert them to RGB"
