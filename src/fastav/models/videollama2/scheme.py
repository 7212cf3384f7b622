"""How a clip becomes tokens: the numbers that the processor, the model and the layouts must agree on."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int

RATE = 16_000  # samples a second of BEATs' input
WINDOW = 400  # samples of one filter-bank row
SHIFT = 160  # samples from one row to the next
MOST_FRAMES = 32  # the original keeps no more
MERGE = 2  # frames, rows and columns that the connector merges into one


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a clip becomes tokens. The defaults are those of the release.

    num_frames: frames sampled from a clip; neighbours are merged in pairs. most_frames: of these, so many are kept.
    image_size, patch_size: pixels a side of a frame and of a SigLIP patch.
    audio_seconds: length of BEATs' input; shorter sound is padded with silence.
    audio_clips, clip_seconds: the pieces cut from a video's soundtrack.
    mel_bins: columns of the filter bank. audio_patch: rows and columns of a BEATs patch.
    interleaved: whether the sound is spread over the pairs of frames, instead of after them all; the release's is not.
    video_token_id, audio_token_id: placeholders in `input_ids`; rows of the embedding that no tokenizer entry uses.
    """

    temporal: ClassVar[int] = MERGE  # frames of a step in time

    num_frames: int = 8
    most_frames: int = MOST_FRAMES
    image_size: int = 384
    patch_size: int = 14
    audio_seconds: int = 30
    audio_clips: int = 8
    clip_seconds: int = 2
    mel_bins: int = 128
    audio_patch: int = 16
    interleaved: bool = False
    video_token_id: int = 152_062
    audio_token_id: int = 152_063

    @property
    def audio_samples(self) -> int:
        """Samples of BEATs' input."""
        return self.audio_seconds * RATE

    @property
    def fbank_rows(self) -> int:
        """Rows of the filter bank: full windows only."""
        return 1 + (self.audio_samples - WINDOW) // SHIFT

    @property
    def audio_grid(self) -> tuple[int, int]:
        """Patches along time and along frequency; the token of patch (t, f) is t * frequencies + f."""
        return self.fbank_rows // self.audio_patch, self.mel_bins // self.audio_patch

    @property
    def audio_tokens(self) -> int:
        """Tokens of a sound, however long."""
        times, frequencies = self.audio_grid
        return times * frequencies

    @property
    def side_tokens(self) -> int:
        """Tokens a side of two merged frames."""
        return self.image_size // self.patch_size // MERGE

    @property
    def pair_tokens(self) -> int:
        """Tokens of two merged frames."""
        return self.side_tokens**2

    def video_tokens(self, frames: int) -> int:
        """Tokens of a video of this many frames; a last odd frame is left out."""
        return frames // MERGE * self.pair_tokens

    def order(self, video: int, audio: int) -> Int[np.ndarray, " tokens"]:
        """The order in which a prompt has a clip's tokens, as indices of its video tokens followed by its audio tokens.

        video, audio: how many there are. If interleaved, each pair of frames is followed by its share of the sound.
        """
        if not self.interleaved:
            return np.arange(video + audio)
        pairs, frequencies = video // self.pair_tokens, self.audio_grid[1]
        times = -(-audio // frequencies)
        pair = np.arange(video) // self.pair_tokens
        after = np.arange(audio) // frequencies * pairs // max(1, times)
        return np.argsort(np.concatenate([pair, after + 0.5]), kind="stable")
