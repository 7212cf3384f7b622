"""From sound to what Whisper hears: pieces of 30 s and their log-mel spectrograms."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastav.models._whisper import log_mel_spectrogram
from fastav.models.video_salmonn2_plus.scheme import PIECE_ROWS, PIECE_SECONDS, PIECE_TOKENS, RATE, audio_tokens


def spectrograms(
    sound: Float[np.ndarray, " samples"], bins: int
) -> tuple[Float[Tensor, "pieces bins rows"], Bool[Tensor, "pieces rows"]]:
    """The spectrogram of each piece of a sound, and which of its rows hold sound.

    sound: mono samples at 16 kHz in [-1, 1]. The last piece is padded with silence; no samples at all is silence.
    """
    pieces, length = audio_tokens(len(sound)) // PIECE_TOKENS, PIECE_SECONDS * RATE
    padded = np.zeros(pieces * length, np.float32)
    padded[: len(sound)] = sound
    heard = torch.arange(pieces * PIECE_ROWS) * (length // PIECE_ROWS) < len(sound)
    return log_mel_spectrogram(padded.reshape(pieces, length), bins), heard.reshape(pieces, PIECE_ROWS)
