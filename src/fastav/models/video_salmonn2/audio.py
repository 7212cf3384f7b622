"""From sound to what Whisper hears: the left channel at 16 kHz, in pieces of 30 s, as log mel spectrograms."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastav.media import Clip
from fastav.media.audio import AudioTrack
from fastav.models._whisper import log_mel_spectrogram
from fastav.models.video_salmonn2.scheme import COLUMNS, HOP, PIECE, RATE, Scheme

TAIL = 1.0  # seconds read past the end, so that the resampler meets the samples it would meet in the whole track


def left_channel(track: AudioTrack, samples: int) -> Float[np.ndarray, " heard"]:
    """The first so many samples, at 16 kHz, of the track's first channel.

    Source: bytedance/video-SALMONN-2 (llava), which reads 16-bit files of 16 kHz and does not mix channels.
    Differs: tracks at other rates, which the original refuses, are resampled as FFmpeg does.
    """
    if track.channels > 1:
        left = track.native(channel=0, max_seconds=samples / RATE + TAIL)
        track = Clip.from_arrays(waveform=left, sample_rate=track.sample_rate).require_audio()
    return track.read(RATE, spans=[(0, samples)])[0]


def log_mel(
    sound: Float[np.ndarray, " samples"], scheme: Scheme | None = None
) -> tuple[Float[Tensor, "pieces bins columns"], Bool[Tensor, "pieces columns"]]:
    """The log mel spectrograms of a sound's pieces, and which of their columns hold sound.

    sound: mono float samples at 16 kHz in [-1, 1]. The last piece is padded with silence; no samples at all are one
    piece of silence.

    Source: arXiv:2212.04356, section 2.2, with 128 bins.
    """
    scheme = scheme or Scheme()
    count = max(1, math.ceil(len(sound) / PIECE))
    pieces = np.pad(np.asarray(sound, np.float32), (0, count * PIECE - len(sound))).reshape(count, PIECE)
    left = len(sound) - torch.arange(count) * PIECE
    return log_mel_spectrogram(pieces, scheme.mel_bins), torch.arange(COLUMNS) * HOP < left[:, None]
