"""From a clip to what the processor takes: sampled frames, sound, and when they are."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from fastav.errors import MissingTrack
from fastav.media import Clip
from fastav.media.audio import AudioTrack
from fastav.messages import Media
from fastav.models._whisper import RATE
from fastav.models.video_salmonn2.scheme import Scheme

TAIL = 1.0  # seconds read past the end, so that the resampler meets the samples it would meet in the whole track


def read_clip(media: Media, scheme: Scheme) -> dict[str, Any]:
    """A clip's sampled frames and sound, how long the video lasts, and when each frame is shown."""
    video, audio = media.tracks
    if not (video or audio):
        raise MissingTrack(f"{media.name} has neither a video nor an audio track")
    clip = media.aligned_clip  # the original takes both tracks to start together, and so puts late sound too early
    read: dict[str, Any] = {"video": None, "audio": None, "seconds": None, "shown": np.zeros(0), "sound_start": 0.0}
    if video:
        track = clip.require_video()
        indices = sample_frames(track.frames, track.fps, scheme)
        read |= {"video": track.read(indices), "seconds": track.frames / track.fps, "shown": track.seconds(indices)}
    if audio:
        seconds = read["seconds"] if video else scheme.max_time
        sound = clip.require_audio()
        read |= {"audio": left_channel(sound, round(RATE * seconds)), "sound_start": sound.start}
    return read


def sample_frames(frames: int, fps: float | int, scheme: Scheme | None = None) -> Int[np.ndarray, " sampled"]:
    """Which of a clip's frames the model takes: one a second, or as many as it may, evenly spaced from first to last.

    frames, fps: how many the clip has, in all and a second.

    Source: bytedance/video-SALMONN-2 (llava), halves rounded to even.
    """
    scheme = scheme or Scheme()
    step = max(round(fps / scheme.video_fps), 1)
    indices = np.arange(0, frames, step, dtype=np.int64)
    if len(indices) > scheme.max_frames:
        indices = np.linspace(0, frames - 1, scheme.max_frames).astype(np.int64)
    return indices


def left_channel(track: AudioTrack, samples: int) -> Float[np.ndarray, " samples"]:
    """The first so many samples, at 16 kHz, of the track's first channel.

    Source: bytedance/video-SALMONN-2 (llava), which reads 16-bit files of 16 kHz and does not mix channels.
    Differs: tracks at other rates, which the original refuses, are resampled as FFmpeg does.
    """
    if track.channels > 1:
        left = track.native(channel=0, max_seconds=samples / RATE + TAIL)
        track = Clip.from_arrays(waveform=left, sample_rate=track.sample_rate).require_audio()
    return track.read(RATE, spans=[(0, samples)])[0]
