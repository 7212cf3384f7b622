"""Clips: frames and sound of a media file or of arrays, decoded on demand."""

from fastav.compatibility import require_tested

require_tested("av", "numpy")  # before imports that fail with other releases

from fastav.media._open import MediaWarning  # noqa: E402
from fastav.media.audio import AudioTrack  # noqa: E402
from fastav.media.clip import Clip  # noqa: E402
from fastav.media.policy import MediaPolicy  # noqa: E402
from fastav.media.video import VideoTrack  # noqa: E402

__all__ = ["AudioTrack", "Clip", "MediaPolicy", "MediaWarning", "VideoTrack"]
