"""What a log mel spectrogram computed in float32 may be: bounds from float32's rounding, and from nothing else.

A float32 Fourier transform of n numbers x is off in every bin by a normal error of standard deviation below
u sqrt(log2 n) |x|, with u = 2**-24 (Gentleman and Sande 1966; Schatzman 1996): by as much where the spectrum is quiet
as where it is loud. So an energy is off by the more, relative to itself, the further it lies below its row's largest.
Five standard deviations either way, carried through the filters and the logarithm, bound what any CPU computes; both
ends rounded to bfloat16 bound what it rounds that to, since rounding keeps order.

Everything here is float64 and written apart from the product's own code.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from transformers.audio_utils import mel_filter_bank

UNIT = 2.0**-24
DEVIATIONS = 5
WINDOW, HOP = 400, 160


@dataclass(frozen=True)
class Bounds:
    """The exact values, and the least and most that float32 may make of them."""

    low: np.ndarray
    exact: np.ndarray
    high: np.ndarray

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Bounds":
        """The same after a function that keeps order."""
        return Bounds(function(self.low), function(self.exact), function(self.high))


def energies(
    rows: Float[np.ndarray, "rows window"],
    raw: Float[np.ndarray, "rows window"],
    size: int,
    filters: Float[np.ndarray, "bins frequencies"],
    filter_error: Float[np.ndarray, "bins frequencies"],
    unit: float = UNIT,
) -> Bounds:
    """Mel energies of windowed rows. raw: what they were before the mean was taken and the window laid over."""
    amplitude = np.abs(np.fft.rfft(rows, size))
    norm = np.hypot(np.linalg.norm(rows, axis=1), np.linalg.norm(raw, axis=1))  # the mean's error is of what was there
    error = DEVIATIONS * unit * np.sqrt(np.log2(size)) * norm[:, None]
    sums = 16 * unit  # relative: a square, a product and the sum over a filter's dozen frequencies
    low = np.maximum(amplitude - error, 0) ** 2 @ np.maximum(filters - filter_error, 0).T * (1 - sums)
    high = (amplitude + error) ** 2 @ (filters + filter_error).T * (1 + sums)
    return Bounds(low, amplitude**2 @ filters.T, high)


def kaldi(sound: Float[np.ndarray, " samples"], bins: int, *, whole: bool = False) -> Bounds:
    """Kaldi's log mel filter bank. sound: on the scale of int16. whole: all but the filters in float64."""
    raw = np.lib.stride_tricks.sliding_window_view(sound.astype(np.float64), WINDOW)[::HOP]
    centred = raw - raw.mean(1, keepdims=True)
    before = np.concatenate([centred[:, :1], centred[:, :-1]], axis=1)
    povey = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / (WINDOW - 1))) ** 0.85
    mel = 1127 * np.log1p(np.arange(257) * 31.25 / 700)
    edges = np.linspace(1127 * np.log1p(20 / 700), 1127 * np.log1p(8000 / 700), bins + 2)
    filters = np.stack([np.interp(mel, edges[i : i + 3], [0, 1, 0]) for i in range(bins)])
    filters[:, -1] = 0
    # a mel, up to 2840, comes out of float32 with an error of some units, and is divided by a triangle's width
    nearby = (mel > edges[:-2, None] - 0.01) & (mel < edges[2:, None] + 0.01)
    filter_error = nearby * (6 * UNIT * mel.max() / (edges[1] - edges[0]))
    unit = 2.0**-53 if whole else UNIT
    found = energies((centred - 0.97 * before) * povey, raw, 512, filters, filter_error, unit)
    floor = np.finfo(np.float32).eps
    levels = found.map(lambda energy: np.log(np.maximum(energy, floor)))
    logarithm = 2 * unit * np.abs(levels.exact)
    return Bounds(levels.low - logarithm, levels.exact, levels.high + logarithm)


def whisper(sound: Float[np.ndarray, " samples"], bins: int) -> Bounds:
    """Whisper's log mel spectrogram of one piece, bins first. sound: in [-1, 1]."""
    padded = np.pad(sound.astype(np.float64), WINDOW // 2, mode="reflect")
    raw = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:-1]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    filters = mel_filter_bank(WINDOW // 2 + 1, bins, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney").T
    found = energies(raw * hann, raw, WINDOW, filters, UNIT * filters)
    levels = found.map(lambda energy: np.log10(np.maximum(energy, 1e-10)))
    scaled = levels.map(lambda level: (np.maximum(level, level.max() - 8) + 4) / 4)
    last = 4 * UNIT * 3  # of the logarithm, at most 10, and of what is done to it
    return Bounds(scaled.low.T - last, scaled.exact.T, scaled.high.T + last)


def in_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16."""
    return torch.from_numpy(np.asarray(values)).to(torch.bfloat16).double().numpy()


def assert_within(values: np.ndarray, bounds: Bounds) -> None:
    """Each is what float32 may have made of the exact one."""
    assert values.shape == bounds.exact.shape
    outside = (values < bounds.low) | (values > bounds.high)
    assert not outside.any(), f"{outside.sum()} of {outside.size}"
