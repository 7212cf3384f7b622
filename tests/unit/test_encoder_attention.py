"""The attention of encoders in blocks and sequences against dense maps, and how towers order and pool patches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.video_llama_3.modeling_video_llama_3 import VideoLlama3VisionModel
from transformers.vision_utils import get_vision_window_index

from fastav.models._encoder_attention import BLOCK_BYTES, received_attention, sequence_attention
from fastav.models._patch_attention import window_order
from fastav.models.video_llama3.adapter import _scaled_down

HEADS, HEAD = 3, 8


def queries_and_keys(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    return torch.randn(*shape, HEAD, generator=make), torch.randn(*shape, HEAD, generator=make)


def dense(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What each token receives: the mean over heads and queries of the whole map, in float64."""
    return (query.double() @ key.double().transpose(-1, -2) * 0.5).softmax(-1).mean((-3, -2))


@pytest.mark.parametrize("queries", [1, 5, 7, 20, 10_000])
def test_blocks_of_any_size_give_what_the_dense_map_says(monkeypatch, queries):
    query, key = queries_and_keys(4, HEADS, 7)
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 4 * HEADS * 7 * queries)
    found = received_attention(query, key, 0.5)
    assert found.dtype == torch.float32
    assert (found - dense(query, key)).abs().max() < 1e-6


def test_a_block_is_as_large_as_it_may_be(monkeypatch):
    """However many tokens and sequences there are."""
    query, key = queries_and_keys(6, HEADS, 10)
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 4 * HEADS * 10 * 4)
    sizes, plain = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda one, *axes: sizes.append(one.numel() * 4) or plain(one, *axes))
    received_attention(query, key, 0.5)
    assert max(sizes) == BLOCK_BYTES["cpu"]


@given(st.lists(st.integers(1, 6), max_size=8))
@settings(max_examples=30, deadline=None)
def test_each_sequence_attends_to_itself(lengths):
    query, key = queries_and_keys(sum(lengths), HEADS)
    found = sequence_attention(query, key, lengths, 0.5)
    assert found.shape == (sum(lengths),)
    pairs = zip(query.split(lengths), key.split(lengths), strict=True) if lengths else ()
    for one, (q, k) in zip(found.split(lengths) if lengths else (), pairs, strict=True):
        assert (one - dense(q.transpose(0, 1), k.transpose(0, 1))).abs().max() < 1e-6


@given(st.lists(st.tuples(*[st.integers(1, n) for n in (3, 9, 9)]), min_size=1, max_size=3), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_windows_are_ordered_as_the_towers_order_them(grids, side):
    merge, patch = 2, 14
    patches = torch.tensor([(time, height * merge, width * merge) for time, height, width in grids])
    index, ends = get_vision_window_index(patches, merge, side * merge * patch, patch)
    order, lengths = window_order(grids, side)
    assert order.tolist() == index.tolist()
    assert [length * merge**2 for length in lengths] == ends.diff().tolist()


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_frames_are_scaled_down_as_video_llama3_scales_them(merge):
    grids = [(2, 2 * merge, 3 * merge), (1, 4 * merge, merge)]
    patches = torch.rand(sum(time * height * width for time, height, width in grids))
    found = [
        _scaled_down(part, *grid, merge)
        for part, grid in zip(patches.split([t * h * w for t, h, w in grids]), grids, strict=True)
    ]
    expected = VideoLlama3VisionModel.pixel_unshuffle(
        None, patches[:, None], torch.tensor(grids), torch.tensor([merge] * len(grids))
    )
    assert torch.equal(torch.cat(found), expected[:, 0])
