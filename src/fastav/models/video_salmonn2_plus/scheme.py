"""How a clip becomes tokens: the numbers that the processor, the model and the layouts must agree on."""

import math
from dataclasses import dataclass
from itertools import pairwise

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from fastav.errors import CheckpointError, MediaError, reason_of
from fastav.models._whisper import COLUMNS, PIECE_SECONDS, pieces

TOKENS_PER_SECOND = 2  # audio tokens a second, and steps a second on the time axis of positions
PIECE_TOKENS = PIECE_SECONDS * TOKENS_PER_SECOND
TOKEN_COLUMNS = COLUMNS // PIECE_TOKENS  # of the spectrogram
POSITIONS = ("script", "dataset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a clip becomes tokens. The defaults are those of the release.

    frame_seconds: seconds from one sampled frame to the next, as far as `min_frames` and `max_frames` allow.
    frame_pixels: most pixels of a frame where `max_frames` are sampled; fewer frames may be larger (`most_pixels`).
    min_pixels: smaller frames are enlarged to it. patch_size: pixels a side of a patch. merge: patches a side of a
    token. temporal: frames that a token shows. mel_bins: rows of the spectrogram.
    positions: how media are placed on the rotary axes, `script` or `dataset` (see `positions.py`).
    *_token_id: rows of the embedding; pads are placeholders, one per media token.

    Raises: CheckpointError if `positions` is neither.
    """

    frame_seconds: float | int = 0.1
    min_frames: int = 16
    max_frames: int = 768
    frame_pixels: int = 61_250
    min_pixels: int = 56 * 56
    patch_size: int = 14
    merge: int = 2
    temporal: int = 2
    mel_bins: int = 128
    positions: str = "script"
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    audio_token_id: int = 151_665

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise CheckpointError(f"positions must be {' or '.join(POSITIONS)}, got {self.positions!r}")

    @property
    def placeholders(self) -> tuple[int, int, int]:
        """Ids that no text may hold."""
        return self.image_token_id, self.video_token_id, self.audio_token_id

    def frames(self, seconds: float) -> int:
        """How many frames are sampled from a video of this length."""
        return min(max(round(seconds / self.frame_seconds), self.min_frames), self.max_frames)

    def most_pixels(self, frames: int) -> float:
        """Most pixels of each of so many frames: about as many altogether, however many there are."""
        if frames >= self.max_frames:
            return float(self.frame_pixels)
        return 0.95 * self.max_frames / frames * self.frame_pixels

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width that frames are scaled to: multiples of a token's side, the aspect ratio nearly kept.

        Raises: MediaError for frames over 200 times as long as wide.
        """
        limit: int = self.most_pixels(frames)  # pyright: ignore[reportAssignmentType]  (only compared and divided by)
        try:
            return smart_resize(height, width, self.patch_size * self.merge, self.min_pixels, limit)
        except ValueError as error:
            raise MediaError(f"frames of {width} x {height} cannot be used: {reason_of(error)}") from None

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along time, height and width, of so many frames of a size that `size` gave."""
        side = self.patch_size * self.merge
        return math.ceil(frames / self.temporal), height // side, width // side

    def step_seconds(self, frames: int, seconds: float) -> float:
        """Seconds from one step of the time axis to the next, where so many frames span so many seconds."""
        return self.temporal / (frames / seconds)


def audio_tokens(samples: int) -> int:
    """Tokens of a sound of this many samples at 16 kHz: whole pieces, the last one padded with silence."""
    return PIECE_TOKENS * pieces(samples)


def audio_per_step(steps: int, step_seconds: float, tokens: int) -> list[int]:
    """How many audio tokens follow the video tokens of each step.

    As many as sound passes in it; the last step takes all that are left, those of padding included, and earlier ones
    take no more than there are.
    """
    ends = [min(tokens, math.floor(TOKENS_PER_SECOND * step_seconds * step)) for step in range(1, steps)]
    bounds = [0, *ends, tokens]
    return [end - start for start, end in pairwise(bounds)]
