"""Statistics of an evaluation against slow, literal versions."""

import itertools
import math
import statistics as literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from fastav.evaluate import statistics

BINARY = st.sampled_from([0.0, 1.0])
REAL = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0])
PAIRS = st.one_of(*(st.lists(st.tuples(score, score), min_size=1, max_size=30) for score in (BINARY, REAL)))


@given(st.lists(BINARY, min_size=1))
def test_the_error_of_zeros_and_ones_is_binomial(scores):
    share = sum(scores) / len(scores)
    assert statistics.mean(scores) == pytest.approx(share)
    assert statistics.standard_error(scores) == pytest.approx(math.sqrt(share * (1 - share) / len(scores)))


@given(st.lists(REAL, min_size=1).filter(lambda scores: any(score not in (0, 1) for score in scores)))
def test_the_error_of_other_scores_is_the_sample_s(scores):
    error = statistics.standard_error(scores)
    if len(scores) == 1:
        assert error is None
    else:
        assert error == pytest.approx(literal.stdev(scores) / math.sqrt(len(scores)), abs=1e-12)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(gained, lost):
    expected = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert statistics.mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)
    assert statistics.mcnemar(lost, gained) == statistics.mcnemar(gained, lost)


def test_mcnemar_of_thousands_does_not_overflow():
    assert statistics.mcnemar(5000, 5000) == 1
    assert statistics.mcnemar(4900, 5100) == pytest.approx(binomtest(4900, 10000, 0.5).pvalue, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(PAIRS)
def test_a_difference_is_that_of_the_pairs(pairs):
    scores, reference = zip(*pairs, strict=True)
    found = statistics.difference(scores, reference)
    assert found.n == len(pairs)
    assert found.points == pytest.approx(100 * sum(a - b for a, b in pairs) / len(pairs))
    assert found.low - 1e-9 <= found.points <= found.high + 1e-9 or len(pairs) < 10
    if all(score in (0, 1) for pair in pairs for score in pair):
        gained, lost = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        assert found.p == statistics.mcnemar(gained, lost)
    else:
        assert found.p is None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.25, 0.0, 0.5, 1.0]), min_size=1, max_size=4))
def test_resampled_means_are_distributed_as_all_resamples_there_are(values):
    means = statistics.resampled_means(np.array(values), seed=3)
    every = [sum(drawn) / len(values) for drawn in itertools.product(values, repeat=len(values))]
    assert len(means) == statistics.RESAMPLES
    for mean in set(every):
        expected = sum(other <= mean + 1e-9 for other in every) / len(every)
        assert (means <= mean + 1e-9).mean() == pytest.approx(expected, abs=0.03)


def test_the_interval_is_that_of_a_literal_bootstrap():
    generator = np.random.default_rng(1)
    reference = (generator.random(300) < 0.6).astype(float)
    scores = np.where(generator.random(300) < 0.1, 1 - reference, reference)
    found = statistics.difference(scores.tolist(), reference.tolist())
    gains = scores - reference
    means = [100 * gains[generator.integers(0, 300, 300)].mean() for _ in range(4000)]
    assert [found.low, found.high] == pytest.approx(list(np.quantile(means, [0.025, 0.975])), abs=0.4)


def test_neither_order_nor_chance_changes_a_result():
    pairs = [(1.0, 0.0), (0.0, 0.0), (0.5, 1.0), (1.0, 1.0), (0.25, 0.5)] * 5
    one = statistics.difference(*zip(*pairs, strict=True))
    assert one == statistics.difference(*zip(*reversed(pairs), strict=True))
    assert one != statistics.difference(*zip(*pairs, strict=True), seed=1)
