"""From a clip to what the processor takes: sampled frames, pieces of sound, and when they are."""

from typing import Any

import numpy as np

from fastav.errors import MissingTrack
from fastav.messages import Media
from fastav.models.videollama2.audio import clip_bounds
from fastav.models.videollama2.scheme import MERGE, RATE, SHIFT, Scheme
from fastav.models.videollama2.video import sample_frames


def read_clip(media: Media, scheme: Scheme) -> dict[str, Any]:
    """A clip's sampled frames and sound, and the second at which each pair of frames and each audio token starts."""
    video, audio = media.tracks
    if not (video or audio):
        raise MissingTrack(f"{media.name} has neither a video nor an audio track")
    read: dict[str, Any] = {"video": None, "audio": None, "rate": RATE, "frame_seconds": [], "sound_seconds": []}
    if video:
        track = media.clip.require_video()
        indices = sample_frames(track.frames, scheme.num_frames, scheme.most_frames)
        read["video"] = track.read(indices)
        read["frame_seconds"] = track.seconds(indices)[: len(indices) // MERGE * MERGE : MERGE]
    times = np.arange(scheme.audio_grid[0]) * scheme.audio_patch * SHIFT  # first sample of each patch
    if audio and video:
        sound = media.clip.require_audio()
        samples = sound.length(RATE)
        bounds = clip_bounds(samples, scheme)
        read["audio"] = sound.read(RATE, spans=[(int(start), int(end)) for start, end in bounds])
        read["sound_seconds"] = _soundtrack_seconds(times, bounds, samples) + sound.start
    elif audio:
        sound = media.clip.require_audio()
        read["audio"] = sound.native(channel=0, max_seconds=float(scheme.audio_seconds))
        read["rate"] = sound.sample_rate
        read["sound_seconds"] = times / RATE + sound.start
    return read


def _soundtrack_seconds(times: np.ndarray, bounds: np.ndarray, samples: int) -> np.ndarray:
    """Where in the clip each sample of the joined pieces is; NaN past their end."""
    lengths = np.minimum(bounds[:, 1], samples) - bounds[:, 0]
    ends = np.cumsum(lengths)
    piece = np.searchsorted(ends, times, side="right")
    known = piece < len(bounds)
    piece = np.minimum(piece, len(bounds) - 1)
    return np.where(known, (bounds[piece, 0] + times - (ends - lengths)[piece]) / RATE, np.nan)
