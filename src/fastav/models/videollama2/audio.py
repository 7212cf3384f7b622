"""From sound to BEATs' input: which pieces of it, resampling, and Kaldi's filter bank."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastav.models.videollama2.scheme import RATE, SHIFT, WINDOW, Scheme

FFT = 512  # the window, rounded up to a power of two
LOWEST_HZ, HIGHEST_HZ = 20.0, RATE / 2
PREEMPHASIS = 0.97
INT16 = 2.0**15


def clip_bounds(samples: int, scheme: Scheme | None = None) -> Int[np.ndarray, "clips 2"]:
    """First sample and end of each piece cut from a video's soundtrack of this many samples, at 16 kHz.

    Piece i of n starts at i/n of (length - piece), so the last n-th of that is left out; pieces overlap in short
    videos and leave gaps in long ones. Ends may lie past the sound (of which each piece then has the whole).

    Source: what VideoLLaMA2 gets from pytorchvideo 0.1.5's uniform clip sampler, in exact arithmetic.
    """
    scheme = scheme or Scheme()
    length = scheme.clip_seconds * RATE
    slack = max(0, samples - length)
    starts = np.arange(scheme.audio_clips, dtype=np.int64) * slack // scheme.audio_clips
    return np.stack([starts, starts + length], axis=1)


def soundtrack_features(
    sound: np.ndarray | Sequence[np.ndarray], scheme: Scheme | None = None
) -> tuple[Float[Tensor, "rows bins"], Bool[Tensor, " rows"]]:
    """The filter bank of a video's soundtrack, and which rows hold sound.

    sound: mono float samples at 16 kHz in [-1, 1]; the whole track, or the pieces already cut at `clip_bounds`. The
    pieces are joined and padded with silence. No samples at all is silence, as where the original fails to decode.

    Source: DAMO-NLP-SG/VideoLLaMA2 (branch audio_visual), audio of videos.
    Differs: in float64, the original's in float32; see `fbank`.
    """
    scheme = scheme or Scheme()
    if isinstance(sound, np.ndarray):
        sound = [sound[start:end] for start, end in clip_bounds(len(sound), scheme)]
    pieces = [np.asarray(piece, np.float32) for piece in sound]
    joined = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    return _padded_features(joined, scheme)


def file_features(
    sound: Float[np.ndarray, " samples"], rate: int, scheme: Scheme | None = None
) -> tuple[Float[Tensor, "rows bins"], Bool[Tensor, " rows"]]:
    """The filter bank of a sound file, and which rows hold sound.

    sound: samples of the file's first channel in [-1, 1]; rate: its sampling rate. Padded to 30 s with silence at that
    rate, then resampled by Fourier transform, all in float64.

    Source: DAMO-NLP-SG/VideoLLaMA2 (branch audio_visual), audio files.
    Differs: of longer sounds the first 30 s are taken; the original takes 30 s at random, so its answers vary.
    """
    scheme = scheme or Scheme()
    first = np.asarray(sound, np.float64)[: scheme.audio_seconds * rate]
    samples = math.ceil(len(first) * RATE / rate)
    padded = np.pad(first, (0, scheme.audio_seconds * rate - len(first)))
    return _padded_features(resample(padded, rate), scheme, samples)


def resample(sound: Float[np.ndarray, " samples"], rate: int) -> Float[np.ndarray, " resampled"]:
    """The sound at 16 kHz, by cutting or padding its spectrum.

    Source: what librosa's `res_type="fft"` does (scipy.signal.resample); same result, without either.
    """
    if rate == RATE:
        return sound
    count, wanted = len(sound), math.ceil(len(sound) * RATE / rate)
    shared = min(count, wanted)
    spectrum = np.fft.rfft(sound)
    out = np.zeros(wanted // 2 + 1, spectrum.dtype)
    out[: shared // 2 + 1] = spectrum[: shared // 2 + 1]
    if shared % 2 == 0 and count != wanted:  # the shared Nyquist bin stands for both its signs on one side only
        out[shared // 2] *= 2.0 if wanted < count else 0.5
    return np.fft.irfft(out, wanted) * (wanted / count)


def fbank(sound: Float[Tensor, " samples"], bins: int = 128) -> Float[Tensor, "rows bins"]:
    """Kaldi's log mel filter bank, without dither and energy, in float64.

    sound: samples at 16 kHz on the scale of int16. Rows are windows of 25 ms every 10 ms, full ones only.

    Source: kaldi-asr.org/doc/feat.html with the Povey window, which is what BEATs was trained on.
    Differs: float64 throughout. A float32 Fourier transform is off by some 1e-7 of a row's loudest frequency, on every
    CPU otherwise; in the quietest bins that is enough to make another bfloat16 of one number in a hundred.
    """
    frames = sound.double().unfold(0, WINDOW, SHIFT)
    frames = frames - frames.mean(1, keepdim=True)
    previous = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    window = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64).pow(0.85)
    frames = (frames - PREEMPHASIS * previous) * window
    power = torch.fft.rfft(torch.nn.functional.pad(frames, (0, FFT - WINDOW))).abs().square()
    energies = power @ mel_filters(bins).T
    return energies.clamp(min=torch.finfo(torch.float32).eps).log()


@cache
def mel_filters(bins: int) -> Float[Tensor, "bins frequencies"]:
    """Triangles that are evenly spaced in mel, in float64; none reaches the Nyquist frequency's bin.

    Source: Kaldi's mel scale, 1127 ln(1 + f / 700).
    """
    low, high = _mel(torch.tensor([LOWEST_HZ, HIGHEST_HZ], dtype=torch.float64))
    edges = low + torch.arange(bins + 2) * ((high - low) / (bins + 1))
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    mel = _mel(torch.arange(FFT // 2, dtype=torch.float64) * (RATE / FFT))[None]
    triangles = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)
    return torch.nn.functional.pad(triangles, (0, 1))


def _mel(hertz: Tensor) -> Tensor:
    return 1127.0 * (hertz / 700.0).log1p()


def _padded_features(
    sound: np.ndarray, scheme: Scheme, samples: int | None = None
) -> tuple[Float[Tensor, "rows bins"], Bool[Tensor, " rows"]]:
    """The filter bank of a sound padded to full length, rounded to bfloat16: the original feeds it so."""
    samples = len(sound) if samples is None else samples
    sound = np.pad(sound[: scheme.audio_samples], (0, max(0, scheme.audio_samples - len(sound))))
    features = fbank(torch.from_numpy(sound) * INT16, scheme.mel_bins).to(torch.bfloat16).float()
    return features, torch.arange(scheme.fbank_rows) < math.ceil(samples / SHIFT)
