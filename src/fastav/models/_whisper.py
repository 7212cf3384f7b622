"""Whisper's input: log mel spectrograms of pieces of 30 s, in float64 so that they do not depend on the CPU."""

import math
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

RATE = 16_000  # samples a second
WINDOW, HOP = 400, 160  # samples of a column, and from one column to the next
PIECE_SECONDS = 30
PIECE = PIECE_SECONDS * RATE  # samples
COLUMNS = PIECE // HOP  # of a piece's spectrogram
FLOOR = 1e-10
RANGE = 8.0  # what lies so many powers of ten below a piece's loudest is raised to that


def pieces(samples: float | int) -> int:
    """How many pieces a sound of this many samples has: at least one, the last one padded with silence."""
    return max(1, math.ceil(samples / PIECE))


def spectrograms(
    sound: Float[np.ndarray, " samples"], bins: int = 128
) -> tuple[Float[Tensor, "pieces bins columns"], Bool[Tensor, "pieces columns"]]:
    """The log mel spectrogram of each piece of a sound, and which of its columns hold sound.

    sound: mono samples at 16 kHz in [-1, 1].
    """
    count = pieces(len(sound))
    padded = np.pad(np.asarray(sound, np.float32), (0, count * PIECE - len(sound))).reshape(count, PIECE)
    is_sound = torch.arange(count * COLUMNS) * HOP < len(sound)
    return log_mel_spectrogram(padded, bins), is_sound.reshape(count, COLUMNS)


def log_mel_spectrogram(pieces: Float[np.ndarray, "pieces samples"], bins: int) -> Float[Tensor, "pieces bins columns"]:
    """The log mel spectrogram of each piece, a column every 10 ms.

    pieces: mono samples at 16 kHz in [-1, 1], all of the same length.

    Source: arXiv:2212.04356, section 2.2, as transformers' WhisperFeatureExtractor.
    Differs: computed in float64 and rounded to float32 once. In float32 the quietest energies, eight powers of ten
    below the loudest, are off in their fourth digit, on every CPU otherwise.
    """
    sound = torch.from_numpy(np.asarray(pieces, np.float64))
    window = torch.hann_window(WINDOW, dtype=torch.float64)
    spectrum = torch.stft(sound, WINDOW, HOP, window=window, return_complex=True)[..., :-1]
    energies = mel_filters(bins) @ spectrum.abs().square()
    levels = energies.clamp(min=FLOOR).log10()
    levels = levels.maximum(levels.amax((1, 2), keepdim=True) - RANGE)
    return ((levels + 4.0) / 4.0).float()


@cache
def mel_filters(bins: int) -> Float[Tensor, "bins frequencies"]:
    """Slaney's triangles of equal area."""
    filters = mel_filter_bank(WINDOW // 2 + 1, bins, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).T.contiguous()
