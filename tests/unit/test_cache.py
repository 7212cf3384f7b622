"""The cache layer that holds fewer tokens than the model believes."""

import numpy as np
import pytest
import torch

from fastav.engines.transformers.kv_cache import PrunedLayer, cached_tokens
from fastav.engines.transformers.masks import decode_mask
from fastav.errors import UnsupportedPlan
from fastav.pruning.indexing import TokenSubset


@pytest.fixture
def layer():
    slots, valid = torch.tensor([[0, 2, 5], [7, 1, 5]]), torch.tensor([[True] * 3, [False, True, True]])
    layer = PrunedLayer(slots, valid, prompt=7, owner="plan")
    states = torch.arange(2 * 3 * 4.0).reshape(2, 1, 3, 4)
    layer.update(states, states)
    with pytest.raises(UnsupportedPlan, match="used without pruning"):
        layer.update(states[:, :, :2], states[:, :, :2])
    layer.expect_tokens()
    layer.update(states[:, :, :2], states[:, :, :2])
    return layer


def test_it_reports_the_unpruned_length(layer):
    assert layer.get_seq_length() == 9
    assert layer.get_mask_sizes(1) == (10, 0)
    assert layer.positions(1).tolist() == [[0, 2, 5, 7, 8, 9], [7, 1, 5, 7, 8, 9]]
    assert layer.validity(1).tolist() == [[True] * 6, [False] + [True] * 5]


def test_rows_follow_every_change_of_the_batch(layer):
    layer.batch_repeat_interleave(2)
    assert layer.slots.tolist() == [[0, 2, 5]] * 2 + [[7, 1, 5]] * 2
    layer.reorder_cache(torch.tensor([3, 0, 0, 1]))
    assert layer.slots.tolist() == [[7, 1, 5]] + [[0, 2, 5]] * 3
    layer.batch_select_indices(torch.tensor([0, 1]))
    assert layer.slots.tolist() == [[7, 1, 5], [0, 2, 5]]
    assert layer.valid.tolist() == [[False, True, True], [True] * 3]
    assert layer.keys.shape == (2, 1, 5, 4)
    assert layer.keys[0, 0, 0, 0] == 12


def test_only_generated_tokens_can_be_cropped(layer):
    layer.crop(-1)
    assert layer.get_seq_length() == 8
    with pytest.raises(UnsupportedPlan, match="only generated tokens"):
        layer.crop(-2)
    with pytest.raises(UnsupportedPlan, match="only generated tokens"):
        layer.crop(3)


def test_it_is_empty_until_it_is_filled():
    layer = PrunedLayer(torch.tensor([[0]]), None, prompt=7, owner="plan")
    assert layer.get_seq_length() == 0
    assert layer.validity(1) is None


def test_a_later_prefill_is_recorded_behind_what_is_stored(layer):
    states = torch.zeros(2, 1, 2, 4)
    later = TokenSubset(torch.tensor([[1, 3], [4, 3]]), torch.tensor([[True, True], [False, True]]))
    layer.expect_prefill(layer.tokens().followed_by(later, 9), length=13)
    layer.update(states, states)
    assert layer.get_seq_length() == 13
    assert layer.n_generated == 0
    assert layer.positions(1).tolist() == [[0, 2, 5, 7, 8, 10, 12, 13], [7, 1, 5, 7, 8, 13, 12, 13]]
    assert layer.validity(0).tolist() == [[True] * 7, [False, True, True, True, True, False, True]]
    index, valid = torch.tensor([[0], [1]]), torch.tensor([[True], [True]])
    layer.keep(index, valid, earlier=5)
    assert layer.positions(0).tolist() == [[0, 2, 5, 7, 8, 10], [13, 1, 5, 7, 8, 12]]
    assert layer.validity(0).tolist() == [[True] * 6, [False] + [True] * 5]
    with pytest.raises(UnsupportedPlan, match="only generated tokens"):
        layer.crop(-1)


def test_a_mask_hides_cached_tokens_from_the_next_prefill(layer):
    mask = torch.ones(2, 12, dtype=torch.long)
    assert cached_tokens([layer], 2, 9, mask)[0].valid.tolist() == layer.validity(0).tolist()
    mask[0, 5] = mask[1, 8] = 0
    (tokens,) = cached_tokens([layer], 2, 9, mask)
    assert tokens.valid.tolist() == [[True, True, False, True, True], [False, True, True, True, False]]


@pytest.mark.parametrize("seed", range(20))
def test_a_window_keeps_every_token_that_a_later_query_may_see(seed):
    """Rows drop other numbers of tokens in every turn, so that padding is stored between their tokens."""
    make, window, past, kept = np.random.default_rng(seed), 6, 0, [set[int](), set[int]()]
    layer = None
    for _ in range(4):
        length = int(make.integers(3, 12))
        rows = [sorted(make.choice(length, make.integers(1, length + 1), replace=False).tolist()) for _ in range(2)]
        width = max(map(len, rows))
        slots = torch.tensor([[length] * (width - len(row)) + row for row in rows])
        new = TokenSubset(slots, slots < length)
        if layer is None:
            layer = PrunedLayer(*new, prompt=length, owner="plan", window=window)
        else:
            layer.expect_prefill(layer.tokens().followed_by(new, past), past + length)
        layer.update(*[torch.zeros(2, 1, width, 4)] * 2)
        for columns, row in zip(kept, rows, strict=True):
            columns |= {past + column for column in row}
        past += length
        for _ in range(int(make.integers(0, 3))):
            layer.expect_tokens()
            layer.update(*[torch.zeros(2, 1, 1, 4)] * 2)
            for columns in kept:
                columns.add(past)
            past += 1
        for columns, slots, real in zip(kept, *layer.tokens(), strict=True):
            stored = {int(slot) for slot, is_real in zip(slots, real, strict=True) if is_real}
            assert {column for column in columns if column > past - window} <= stored <= columns


def test_a_mask_of_the_last_columns_hides_what_stands_before_them():
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)  # places 6 to 9 of 10
    out = decode_mask(mask, torch.tensor([[0, 5, 6, 9]]), None, total=10, n_new=1, kind="sdpa", dtype=torch.float32)
    assert out.tolist() == [[[[False, False, True, True]]]]
