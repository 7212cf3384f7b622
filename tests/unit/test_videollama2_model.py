"""VideoLLaMA2's computation, apart from what the original's arrays show."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch

from fastav.models.videollama2.audio import fbank, mel_filters, resample
from fastav.models.videollama2.beats import PositionConv, relative_buckets
from support.native import VIDEOLLAMA2 as FAMILY

RANDOM = np.random.default_rng(0)


def test_fused_audio_attention_equals_the_written_out_one() -> None:
    model = FAMILY.model_class.from_pretrained(FAMILY.tiny, dtype=torch.float64)
    features = torch.randn(2, 160, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fused = model.model.audio_tower(features)
        model.set_attn_implementation("eager")
        written_out = model.model.audio_tower(features)
    assert (fused - written_out).abs().max() <= 1e-9


def test_relative_buckets_are_t5s() -> None:
    def bucket(offset: int) -> int:
        base, distance = 160 * (offset > 0), abs(offset)
        far = 80 + math.floor(math.log(max(distance, 1) / 80) / math.log(800 / 80) * 80 + 1e-9)
        return base + (distance if distance < 80 else min(far, 159))

    buckets = relative_buckets(1496, 320, 800, torch.device("cpu")).tolist()
    wanted = [bucket(offset) for offset in range(-1495, 1496)]
    assert sum(ours != theirs for ours, theirs in zip(buckets, wanted, strict=True)) <= 4  # float32 on a boundary
    assert max(buckets) == 319


def test_position_bias_reads_the_bucket_of_each_key_minus_query() -> None:
    model = FAMILY.model()
    attention: Any = model.model.audio_tower.encoder.layers[0].self_attn
    table = attention.relative_attention_bias.weight
    bias = attention.position_bias(7, torch.device("cpu"))
    assert bias.shape == (1, table.shape[1], 7, 7)
    assert torch.equal(bias[0, :, 2, 5], table[160 + 3])
    assert torch.equal(bias[0, :, 6, 1], table[5])


def test_position_convolution_has_one_norm_per_tap() -> None:
    conv = PositionConv(channels=8, kernel=4, groups=2)
    with torch.no_grad():
        conv.weight_v.normal_()
        conv.weight_g.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0])[None, None])
    assert torch.allclose(conv.weight.square().sum((0, 1)).sqrt(), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert conv(torch.randn(1, 5, 8)).shape == (1, 5, 8)
    half = conv.to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rate", "samples"), [(44_100, 44_100), (48_000, 4801), (8000, 8000), (8000, 8001), (16_000, 9)]
)
def test_resampling_is_scipys(rate: int, samples: int) -> None:
    sound = RANDOM.normal(size=samples)
    wanted = sound if rate == 16_000 else scipy.signal.resample(sound, math.ceil(samples * 16_000 / rate))
    assert np.abs(resample(sound, rate) - wanted).max() <= 1e-12


def test_filter_bank_is_kaldis_formula() -> None:
    sound = RANDOM.normal(size=400 + 160 * 2) * 1000
    ours = fbank(torch.from_numpy(sound), bins=24)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    filters = mel_filters(24).double().numpy()
    for row in range(3):
        frame = sound[160 * row : 160 * row + 400]
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        spectrum = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512) @ (frame * hann**0.85)
        assert np.abs(np.log(filters @ np.abs(spectrum) ** 2) - ours[row].numpy()).max() <= 1e-6


def test_mel_filters_are_evenly_spaced_triangles() -> None:
    filters = mel_filters(128)
    assert filters.shape == (128, 257)
    assert not filters[:, -1].any()
    mel = 1127 * np.log1p(np.arange(257) * 31.25 / 700)
    edges = np.linspace(1127 * np.log1p(20 / 700), 1127 * np.log1p(8000 / 700), 130)
    wanted = np.interp(mel[:256], edges[40:43], [0, 1, 0])
    assert np.abs(filters[40, :256].numpy() - wanted).max() <= 1e-4
