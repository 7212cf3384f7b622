"""From a clip to what the processor takes: sampled frames, sound, and when they are."""

from typing import Any

from fastav.errors import MissingTrack
from fastav.messages import Media
from fastav.models._whisper import RATE
from fastav.models.video_salmonn2_plus.scheme import Scheme
from fastav.models.video_salmonn2_plus.video import read_frames, sample_frames


def read_clip(media: Media, scheme: Scheme) -> dict[str, Any]:
    """A clip's sampled frames and sound, its length, and the second at which each step starts."""
    video, audio = media.tracks
    if not video:
        raise MissingTrack(
            f"{media.name} is shown without video, and video-SALMONN 2+ takes sound only along with a picture",
            "use a clip with video, or another model",
        )
    clip = media.aligned_clip  # the original takes both tracks to start together, and so puts late sound too early
    track = clip.require_video()
    seconds = track.frames / track.fps
    indices = sample_frames(track.frames, scheme.frames(seconds))
    return {
        "video": read_frames(track, indices, scheme),
        "audio": clip.require_audio().read(RATE) if audio else None,
        "seconds": seconds,
        "step_starts": track.seconds(indices)[:: scheme.temporal],
    }
