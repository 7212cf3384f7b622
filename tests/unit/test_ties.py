"""The comparison of generated ids lets go of near ties alone."""

from types import SimpleNamespace

import pytest
import torch

from support.ties import assert_ids_where_decided, assert_same_greedy


def output(ids: list[int], logits: list[list[float]]) -> SimpleNamespace:
    steps = tuple(torch.tensor([step]) for step in logits)
    return SimpleNamespace(sequences=torch.tensor([[9, *ids]]), logits=steps, scores=steps)


TIE = [[0.0, 1.0, 1.0 + 1e-5], [0.0, 1.0, 3.0]]


def test_an_id_may_differ_where_two_logits_are_nearer_than_their_error():
    assert_same_greedy(output([1, 0], [[0.0, 1.0, 1.0], [5.0, 0.0, 0.0]]), output([2, 2], TIE), 1e-4)
    model = SimpleNamespace(generate=lambda **_: output([1, 0], [[0.0, 1.0, 1.0], [5.0, 0.0, 0.0]]))
    assert not assert_ids_where_decided(model, {}, [2, 2], 1e-4)


@pytest.mark.parametrize(
    "found",
    [
        output([2, 1], TIE),  # decided, and another
        output([0, 2], TIE),  # tied, but not one of the two
        output([2, 2], [[0.0, 1.0, 1.0], [0.0, 1.0, 3.1]]),  # the logits differ
        output([1, 0], [[0.1, 1.0, 1.0], [5.0, 0.0, 0.0]]),  # the logits of the tie differ
    ],
)
def test_no_other_id_may(found):
    with pytest.raises(AssertionError):
        assert_same_greedy(found, output([2, 2], TIE), 1e-4)


def test_ids_that_the_scores_decide_are_the_wanted_ones():
    model = SimpleNamespace(generate=lambda **_: output([2, 2], TIE))
    assert assert_ids_where_decided(model, {}, [2, 2], 1e-4)
    with pytest.raises(AssertionError, match="at step 1"):
        assert_ids_where_decided(model, {}, [2, 1], 1e-4)
