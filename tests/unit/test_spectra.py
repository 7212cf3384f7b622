"""The bounds that the parity tests of sound judge by hold what float32 computes in any order, and nothing else."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from fastav.models._whisper import log_mel_spectrogram
from fastav.models.videollama2.audio import fbank, mel_filters
from support.spectra import assert_within, in_bfloat16, kaldi, whisper

BINS = 128
Spectrum = Callable[[torch.Tensor], torch.Tensor]


def sound() -> np.ndarray:
    """A loud tone over faint noise, then a faint tone alone, then silence: all that a spectrum's range may be."""
    time, noise = np.arange(16_000) / 16_000, np.random.default_rng(0).normal(size=16_000)
    tone = 0.8 * np.sin(2 * np.pi * 440 * time) + 1e-4 * noise + 0.1
    faint = 1e-3 * np.sin(2 * np.pi * 3000 * time)
    return np.round(np.concatenate([tone, faint, np.zeros(4000)]) * 32768).astype(np.float32) / 32768


def by_transform(frames: torch.Tensor) -> torch.Tensor:
    return torch.fft.rfft(frames, 512).abs()


def by_product(frames: torch.Tensor) -> torch.Tensor:
    """The same transform as a product with a matrix: summed in another order altogether."""
    angles = torch.outer(torch.arange(frames.shape[1]), torch.arange(257)).double() * (2 * torch.pi / 512)
    real, imaginary = (frames @ table.to(frames.dtype) for table in (angles.cos(), angles.sin()))
    return (real.square() + imaginary.square()).sqrt()


def in_float32(sound: np.ndarray, spectrum: Spectrum, *, window: float = 0.85, emphasis: float = 0.97) -> np.ndarray:
    """Kaldi's filter bank, all of it in float32."""
    frames = (torch.from_numpy(sound) * 32768).unfold(0, 400, 160)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames - emphasis * torch.cat([frames[:, :1], frames[:, :-1]], 1)
    power = spectrum(frames * torch.hann_window(400, periodic=False).pow(window)).square()
    energies = power @ mel_filters(BINS).float().T
    return in_bfloat16(energies.clamp(min=torch.finfo(torch.float32).eps).log())


@pytest.mark.parametrize("spectrum", [by_transform, by_product])
def test_a_filter_bank_in_float32_lies_within_the_bounds(spectrum: Spectrum) -> None:
    assert_within(in_float32(sound(), spectrum), kaldi(sound() * 32768, BINS).map(in_bfloat16))


@pytest.mark.parametrize("changed", [{"window": 0.86}, {"emphasis": 0.969}])
def test_another_filter_bank_does_not(changed: dict[str, float]) -> None:
    with pytest.raises(AssertionError, match="of"):
        assert_within(in_float32(sound(), by_transform, **changed), kaldi(sound() * 32768, BINS).map(in_bfloat16))


def test_our_filter_bank_is_the_exact_one() -> None:
    bounds = kaldi(sound() * 32768, BINS)
    assert np.abs(fbank(torch.from_numpy(sound()) * 32768, BINS).numpy() - bounds.exact).max() <= 1e-7


def test_whispers_spectrogram_in_float32_lies_within_the_bounds() -> None:
    piece = np.pad(sound(), (0, 480_000 - len(sound())))
    theirs = WhisperFeatureExtractor(feature_size=BINS)([piece], sampling_rate=16_000, return_tensors="np")
    bounds = whisper(piece, BINS)
    assert_within(theirs["input_features"][0], bounds)
    ours = log_mel_spectrogram(piece[None], BINS)[0].numpy()
    assert np.abs(ours - bounds.exact).max() <= 2**-23
    with pytest.raises(AssertionError, match="of"):
        assert_within(theirs["input_features"][0][:, :-1], whisper(piece[1:], BINS))
