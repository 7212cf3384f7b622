"""Statistics of an evaluation against slow, literal versions."""

import math
import statistics as literal
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from fastav import statistics

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


@given(st.lists(BINARY, min_size=1))
def test_an_interval_is_wilsons(scores):
    low, high = statistics.interval(scores)
    expected = binomtest(int(sum(scores)), len(scores)).proportion_ci(method="wilson")
    assert (low, high) == (pytest.approx(expected.low, abs=1e-9), pytest.approx(expected.high, abs=1e-9))


@given(st.one_of(st.lists(BINARY, min_size=1), st.lists(REAL, min_size=1)))
def test_an_interval_holds_the_mean_and_has_a_width(scores):
    low, high = statistics.interval(scores)
    assert 0 <= low <= statistics.mean(scores) <= high <= 1
    assert high - low > 1e-3


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
    if all(score in (0, 1) for pair in pairs for score in pair):
        gained, lost = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        assert found.p == statistics.mcnemar(gained, lost)
    else:
        assert found.p is None


@given(st.lists(st.tuples(BINARY, BINARY), min_size=1, max_size=30))
def test_the_interval_of_a_difference_is_bonett_and_prices(pairs):
    n, gained, lost = len(pairs), sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    more, less = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = NormalDist().inv_cdf(0.975) * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    low, high = max(-1, more - less - half), min(1, more - less + half)
    mean = (gained - lost) / n
    found = statistics.difference(*zip(*pairs, strict=True))
    assert (found.low, found.high) == (pytest.approx(100 * min(low, mean)), pytest.approx(100 * max(high, mean)))


@given(PAIRS)
def test_the_interval_of_a_difference_holds_it_and_has_a_width(pairs):
    found = statistics.difference(*zip(*pairs, strict=True))
    assert -100 <= found.low <= found.points + 1e-9
    assert found.points - 1e-9 <= found.high <= 100
    assert found.high - found.low > 1


def test_the_interval_of_many_samples_is_that_of_a_bootstrap():
    generator = np.random.default_rng(1)
    reference = (generator.random(300) < 0.6).astype(float)
    scores = np.where(generator.random(300) < 0.1, 1 - reference, reference)
    found = statistics.difference(scores.tolist(), reference.tolist())
    gains = scores - reference
    means = [100 * gains[generator.integers(0, 300, 300)].mean() for _ in range(4000)]
    assert [found.low, found.high] == pytest.approx(list(np.quantile(means, [0.025, 0.975])), abs=0.5)
