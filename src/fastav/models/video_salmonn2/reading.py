"""From a clip to what the processor takes: sampled frames, sound, and when they are."""

from typing import Any

import numpy as np

from fastav.adapter import Request
from fastav.errors import MissingTrack
from fastav.models.video_salmonn2.audio import left_channel
from fastav.models.video_salmonn2.scheme import RATE, Scheme
from fastav.models.video_salmonn2.video import sample_frames


def read_clip(request: Request, scheme: Scheme) -> dict[str, Any]:
    """A clip's sampled frames and sound, how long the video lasts, and when each frame is shown."""
    video, audio = request.tracks
    if not (video or audio):
        raise MissingTrack(f"{request.clip.name} has neither a video nor an audio track")
    clip = request.shown  # the original takes both tracks to start together, and hears late sound too early
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
