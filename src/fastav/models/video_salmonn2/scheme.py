"""How a clip becomes tokens: the numbers that the processor, the model and the layouts must agree on."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from fastav.models._whisper import PIECE_SECONDS

SPREAD_RATE = 50  # audio tokens a second that the original reckons with when it spreads them over frames


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a clip becomes tokens. The defaults are those of the release.

    video_fps, max_time: frames sampled a second, and the seconds after which there are no more of them; sound without
    a video is cut there.
    image_size, patch_size: pixels a side of a frame and of a SigLIP patch. pool_stride: patches a side of a token.
    mel_bins: rows of the mel spectrogram. audio_positions: what Whisper makes of a piece of 30 s.
    second_per_window, second_stride: what the Q-Former looks at for each of its `query_tokens`.
    time_tokens: whether silent frames are followed by their time, as text.
    video_token_id, audio_token_id, blank_token_id: placeholders in `input_ids`; rows of the embedding that no tokenizer
    entry uses. A blank is a zero vector, which pads a frame's time.
    """

    temporal: ClassVar[int] = 1  # frames of a step in time

    video_fps: float | int = 1
    max_time: float | int = 110
    image_size: int = 384
    patch_size: int = 14
    pool_stride: int = 2
    mel_bins: int = 128
    audio_positions: int = 1500
    second_per_window: float | int = 0.5
    second_stride: float | int = 0.5
    query_tokens: int = 1
    time_tokens: bool = True
    video_token_id: int = 152_062
    audio_token_id: int = 152_063
    blank_token_id: int = 152_061

    @property
    def max_frames(self) -> int:
        """Frames sampled at most."""
        return round(self.max_time * self.video_fps)

    @property
    def side_tokens(self) -> int:
        """Tokens a side of a frame, without newlines."""
        return self.image_size // self.patch_size // self.pool_stride

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame: its pooled patches, and a newline after each row of them."""
        return self.side_tokens * (self.side_tokens + 1)

    @property
    def window(self) -> int:
        """Positions of Whisper that the Q-Former looks at at once."""
        return round(self.audio_positions * self.second_per_window / PIECE_SECONDS)

    @property
    def stride(self) -> int:
        """Positions from one window to the next."""
        return round(self.audio_positions * self.second_stride / PIECE_SECONDS)

    @property
    def windows(self) -> int:
        """Windows of a piece: full ones only."""
        return (self.audio_positions - self.window) // self.stride + 1

    @property
    def piece_tokens(self) -> int:
        """Tokens of a piece of sound, however little of it is sound."""
        return self.windows * self.query_tokens

    def piece_seconds(self) -> Float[np.ndarray, " piece_tokens"]:
        """When the windows of a piece's tokens start."""
        starts = np.arange(self.windows) * self.stride * PIECE_SECONDS / self.audio_positions
        return np.repeat(starts, self.query_tokens)

    def has_sound(self, columns: Bool[np.ndarray, "pieces columns"]) -> Bool[np.ndarray, " tokens"]:
        """Whether the window of each token holds sound, given which columns of the mel spectrograms do."""
        wide = columns.shape[1] // self.audio_positions
        views = np.lib.stride_tricks.sliding_window_view(columns, self.window * wide, axis=1)
        return np.repeat(views[:, :: self.stride * wide].any(-1), self.query_tokens, axis=1).ravel()

    def spread(
        self, tokens: int, frames: int, seconds: float | int
    ) -> tuple[Int[np.ndarray, "frames each"], Int[np.ndarray, " rest"]]:
        """Which audio tokens follow each frame, and which follow them all.

        tokens: of the sound, padding included. seconds: of the video. Tokens are repeated so that every frame gets as
        many. Some are left over for the end only where a video lasts less than 1.2 s.

        Source: bytedance/video-SALMONN-2 (llava). That a clip's sound is spread over its frames together with the
        padding of its last piece is the original's doing: below 30 s, frames and sound do not meet in time.
        """
        front = min(tokens, round(seconds * SPREAD_RATE))
        each = math.ceil(front / frames)
        spread = np.arange(each * frames) * front // max(1, each * frames)
        return spread.reshape(frames, each), np.arange(front, tokens)
