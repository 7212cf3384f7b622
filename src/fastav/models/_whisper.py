"""Whisper's input: log mel spectrograms of pieces of 30 s, in float64 so that all CPUs give the same result."""

import math
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

RATE = 16_000  # samples per second
WINDOW, HOP = 400, 160  # samples per column, and samples between the starts of columns
PIECE_SECONDS = 30
PIECE = PIECE_SECONDS * RATE  # samples
COLUMNS = PIECE // HOP  # per piece
FLOOR = 1e-10
RANGE = 8.0  # powers of ten: quieter levels are raised to this far below the piece's loudest


def pieces(samples: float | int) -> int:
    """The number of pieces of audio of this many samples: at least one, the last one padded with silence."""
    return max(1, math.ceil(samples / PIECE))


def spectrograms(
    waveform: Float[np.ndarray, " samples"], bins: int = 128
) -> tuple[Float[Tensor, "pieces bins columns"], Bool[Tensor, "pieces columns"]]:
    """The log mel spectrogram of each piece of the audio, and a mask of the columns that are not padding.

    waveform: mono samples at 16 kHz in [-1, 1].
    """
    count = pieces(len(waveform))
    padded = np.pad(np.asarray(waveform, np.float32), (0, count * PIECE - len(waveform))).reshape(count, PIECE)
    is_sound = torch.arange(count * COLUMNS) * HOP < len(waveform)
    return log_mel_spectrogram(padded, bins), is_sound.reshape(count, COLUMNS)


def log_mel_spectrogram(pieces: Float[np.ndarray, "pieces samples"], bins: int) -> Float[Tensor, "pieces bins columns"]:
    """The log mel spectrogram of each piece, one column per 10 ms.

    pieces: mono samples at 16 kHz in [-1, 1], all of the same length.

    Source: arXiv:2212.04356, section 2.2, as transformers' WhisperFeatureExtractor.
    Differs: computed in float64 and rounded to float32 once. In float32 the quietest energies, eight powers of ten
    below the loudest, are wrong in their fourth digit, and differently on every CPU.
    """
    waveform = torch.from_numpy(np.asarray(pieces, np.float64))
    window = torch.hann_window(WINDOW, dtype=torch.float64)
    spectrum = torch.stft(waveform, WINDOW, HOP, window=window, return_complex=True)[..., :-1]
    energies = mel_filters(bins) @ spectrum.abs().square()
    levels = energies.clamp(min=FLOOR).log10()
    levels = levels.maximum(levels.amax((1, 2), keepdim=True) - RANGE)
    return ((levels + 4.0) / 4.0).float()


@cache
def mel_filters(bins: int) -> Float[Tensor, "bins frequencies"]:
    """Slaney's triangular mel filters of equal area."""
    filters = mel_filter_bank(WINDOW // 2 + 1, bins, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).T.contiguous()
