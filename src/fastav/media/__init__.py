"""Clips: frames and sound of a media file, or of arrays, decoded only where asked for."""

from fastav.media._open import MediaWarning
from fastav.media.audio import AudioTrack
from fastav.media.clip import Clip
from fastav.media.policy import MediaPolicy
from fastav.media.video import VideoTrack

__all__ = ["AudioTrack", "Clip", "MediaPolicy", "MediaWarning", "VideoTrack"]
