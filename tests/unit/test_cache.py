"""The cache layer that holds fewer tokens than the model believes."""

import pytest
import torch

from fastav.engines.transformers.kv_cache import PrunedLayer
from fastav.engines.transformers.masks import decode_mask
from fastav.errors import UnsupportedPlan


@pytest.fixture
def layer():
    slots, valid = torch.tensor([[0, 2, 5], [7, 1, 5]]), torch.tensor([[True] * 3, [False, True, True]])
    layer = PrunedLayer(slots, valid, prompt=7, owner="plan")
    states = torch.arange(2 * 3 * 4.0).reshape(2, 1, 3, 4)
    layer.update(states, states)
    with pytest.raises(UnsupportedPlan, match="used without pruning"):
        layer.update(states[:, :, :2], states[:, :, :2])
    layer.expects_update = True
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


def test_a_mask_of_the_last_columns_hides_what_stands_before_them():
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)  # places 6 to 9 of 10
    out = decode_mask(mask, torch.tensor([[0, 5, 6, 9]]), None, total=10, n_new=1, kind="sdpa", dtype=torch.float32)
    assert out.tolist() == [[[[False, False, True, True]]]]
