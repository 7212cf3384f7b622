"""Rows of attention and of the rollout against dense maps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.pruning.attention import attention_rows, last_query_attention, weighted_attention
from fastav.pruning.rollout import LayerAttention, rollout_row, rollout_rows

HEADS, KV_HEADS, FEATURES = 4, 2, 8
SCALING = FEATURES**-0.5


def queries_and_keys(tokens: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, HEADS, tokens, FEATURES, generator=make)
    return query, torch.randn(batch, KV_HEADS, tokens, FEATURES, generator=make)


def dense(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The whole map, mean over heads; rows that see nothing are zero."""
    key = key.repeat_interleave(HEADS // KV_HEADS, 1)
    logits = (query @ key.transpose(-1, -2) * SCALING).masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).nan_to_num(0).mean(1)


def seen_of(tokens: int, real: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    valid = torch.arange(tokens)[None] >= tokens - torch.tensor(real)[:, None]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return causal[None, None] & valid[:, None, None], valid


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "per head"])
@given(tokens=st.integers(1, 12), short=st.integers(0, 11), data=st.data())
@settings(max_examples=40, deadline=None)
def test_rows_are_those_of_the_dense_map(kind, tokens, short, data):
    first = data.draw(st.integers(0, tokens - 1))
    last = data.draw(st.integers(first + 1, tokens))
    query, key = queries_and_keys(tokens)
    seen, valid = seen_of(tokens, [tokens, max(1, tokens - short)])
    mask = {
        "none": None,
        "bool": seen,
        "additive": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
        "per head": seen.expand(-1, HEADS, -1, -1),
    }[kind]
    rows = attention_rows(query, key, mask, valid, SCALING, first=first, last=last)
    expected = dense(query, key, seen)[:, first:last]
    real = valid[:, first:last]
    assert (rows - expected)[real].abs().max() < 1e-5 if real.any() else True
    assert (last_query_attention(query, key, mask, valid, SCALING) - dense(query, key, seen)[:, -1]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["none", "bool", "sliding", "bidirectional", "per head"])
@pytest.mark.parametrize("block", [1, 3, None])
@given(tokens=st.integers(1, 12), fewer=st.integers(0, 5), data=st.data())
@settings(max_examples=20, deadline=None)
def test_weights_times_the_map_in_blocks(kind, block, tokens, fewer, data):
    queries = max(1, tokens - fewer)
    query, key = queries_and_keys(tokens)
    seen, valid = seen_of(tokens, [tokens, data.draw(st.integers(1, tokens))])
    place = torch.arange(tokens)
    seen = {
        "sliding": seen & (place[:, None] - place < 3),
        "bidirectional": seen | ((place[:, None] < 4) & (place < 4) & valid[:, None, None]),
    }.get(kind, seen)
    mask = {"none": None, "per head": seen.expand(-1, HEADS, -1, -1)}.get(kind, seen)
    weights = torch.rand(2, 3, queries, generator=torch.Generator().manual_seed(1))
    cut = None if mask is None else mask[:, :, tokens - queries :]
    found = weighted_attention(weights, query[:, :, tokens - queries :], key, cut, valid, SCALING, block=block)
    real = valid[:, tokens - queries :].float()
    expected = (weights * real[:, None]) @ dense(query, key, seen)[:, tokens - queries :]
    assert (found - expected).abs().max() < 1e-5


def test_a_flash_mask_says_no_more_than_what_is_real():
    query, key = queries_and_keys(6)
    seen, valid = seen_of(6, [6, 4])
    rows = attention_rows(query, key, valid, valid, SCALING, first=3)
    assert (rows - dense(query, key, seen)[:, 3:]).abs().max() < 1e-5


@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_the_rollouts_row_is_that_of_the_dense_product(block, alpha):
    tokens, real = 9, [9, 6]
    seen, valid = seen_of(tokens, real)
    slots = torch.arange(tokens).expand(2, tokens)
    layers, product = [], torch.eye(tokens).expand(2, -1, -1)
    for seed in range(4):
        query, key = queries_and_keys(tokens, seed=seed)
        layers.append(LayerAttention(query, key, None, SCALING, slots, slots, valid))
        product = (alpha * dense(query, key, seen) + (1 - alpha) * torch.eye(tokens)) @ product
    start = torch.zeros(2, tokens + 1)
    start[:, tokens - 1] = 1
    row = rollout_row(layers, start, alpha=alpha, block=block)
    assert (row[:, :-1] - product[:, -1]).abs().max() < 1e-5
    assert row.sum(1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_rows_of_every_layer_come_in_one_pass(alpha):
    tokens, real = 9, [9, 6]
    seen, valid = seen_of(tokens, real)
    slots = torch.arange(tokens).expand(2, tokens)
    starts = torch.zeros(2, 2, tokens + 1)
    starts[:, 0, tokens - 1] = 1
    starts[:, 1, :-1] = valid / valid.sum(1, keepdim=True)
    layers, product, attention, rollout = [], torch.eye(tokens).expand(2, -1, -1), [], []
    for seed in range(4):
        query, key = queries_and_keys(tokens, seed=seed)
        layers.append(LayerAttention(query, key, None, SCALING, slots, slots, valid))
        product = (alpha * dense(query, key, seen) + (1 - alpha) * torch.eye(tokens)) @ product
        attention.append(starts[..., :-1] @ dense(query, key, seen))
        rollout.append(starts[..., :-1] @ product)
    rows = rollout_rows(layers, starts, alpha=alpha)
    assert (rows.attention[..., :-1] - torch.stack(attention)).abs().max() < 1e-5
    assert (rows.rollout[..., :-1] - torch.stack(rollout)).abs().max() < 1e-5
    assert rows.rollout.shape == (4, 2, 2, tokens + 1)


def test_layers_on_fewer_tokens_pass_on_the_weight_of_those():
    first, second = queries_and_keys(5, batch=1, seed=1), queries_and_keys(3, batch=1, seed=2)
    kept = torch.tensor([[0, 2, 4]])
    layers = [
        LayerAttention(*first, None, SCALING, *[torch.arange(5)[None]] * 2, None),
        LayerAttention(*second, None, SCALING, kept, kept, None),
    ]
    start = torch.zeros(1, 6)
    start[0, 4] = 1
    seen = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    top = torch.zeros(1, 5).scatter(1, kept, (0.5 * dense(*second, seen) + 0.5 * torch.eye(3))[:, -1])
    whole = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    expected = top @ (0.5 * dense(*first, whole)[0] + 0.5 * torch.eye(5))
    assert (rollout_row(layers, start)[:, :-1] - expected).abs().max() < 1e-6
