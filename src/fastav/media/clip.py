"""A clip: the video and audio tracks of one file, or of arrays."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from av.container import InputContainer
from av.stream import Disposition, Stream

from fastav.errors import MissingTrack, UnreadableMedia
from fastav.media._frames import ArrayFrames
from fastav.media._open import opened
from fastav.media.audio import AudioTrack, audio_of_array, probe_audio
from fastav.media.video import VideoTrack, probe_video

PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """A video with or without sound, or sound alone.

    A clip keeps no file open: each read of a track opens the file anew, so clips are cheap and safe across threads.
    duration: of the longer track, in seconds.
    """

    name: str
    video: VideoTrack | None
    audio: AudioTrack | None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Clip":
        """Find out what is in a media file.

        One frame is decoded; a video of up to 10 minutes is also scanned for the times of its frames. A cover picture
        is no video track. Of several tracks, FFmpeg's choice is taken.

        Raises: UnreadableMedia if the file is missing, no media, cut short, without a track, or absurdly large.
        """
        path = Path(path)
        with opened(path) as container:
            video = _choose(container, "video")
            audio = _choose(container, "audio")
            if video is None and audio is None:
                message = f"{path.name} has neither video nor audio that can be decoded"
                raise UnreadableMedia(message, "expected a video or audio file")
        return cls(
            name=path.name,
            video=None if video is None else probe_video(path, video),
            audio=None if audio is None else probe_audio(path, audio),
        )

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

        frames: uint8 [frames, height, width, 3]. waveform: float [channels, samples] or [samples]. Either is an array
        or a tensor of torch, on any device.
        Raises: UnreadableMedia if both are missing, an array is empty or misshapen, or `sample_rate` is missing.
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
        """Length of the longer track, in seconds."""
        return max(track.duration for track in (self.video, self.audio) if track is not None)

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


def _choose(container: InputContainer, kind: Literal["video", "audio"]) -> int | None:
    """Index of the stream to use: FFmpeg's choice unless that is a cover picture or has no decoder."""

    def usable(stream: Stream) -> bool:
        return stream.codec_context is not None and not stream.disposition & PICTURES

    candidates = [container.streams.best(kind), *(s for s in container.streams if s.type == kind)]
    return next((s.index for s in candidates if s is not None and usable(s)), None)


def array_of(values: Any) -> np.ndarray:
    """An array of whatever numpy makes one of, and of tensors: on any device, with a gradient, in bfloat16."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if "bfloat16" in str(values.dtype):  # which numpy does not have
            values = values.float()
        values = values.numpy()
    return np.asarray(values)


def _video_of_array(frames: np.ndarray, fps: float | int) -> VideoTrack:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        found = f"{frames.dtype} {list(frames.shape)}"
        raise UnreadableMedia(f"frames must be uint8 [frames, height, width, 3], got {found}", _advice(frames))
    if not fps > 0:
        raise UnreadableMedia(f"fps must be positive, got {fps}", "25 is usual")
    count, height, width, _ = frames.shape
    source = ArrayFrames(pictures=frames, fps=float(fps))
    return VideoTrack(frames=count, fps=float(fps), duration=count / fps, width=width, height=height, source=source)


def _advice(frames: np.ndarray) -> str:
    if frames.ndim == 4 and frames.shape[1] == 3 and frames.shape[3] != 3:
        return "put the channels last: frames.transpose(0, 2, 3, 1), or permute of a tensor"
    return "scale them to 0..255 first" if frames.dtype.kind == "f" else "convert them to RGB"
