"""Measures of agreement against their definitions, and the statistics over questions."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav import statistics
from fastav.agreement import Agreement, longest_common_subsequence, rouge_l, words
from fastav.engine import Answer
from fastav.errors import FastAVError
from fastav.evaluate.divergence import CHUNK, Divergence, kl_divergence
from fastav.flops import Saving

TEXTS = st.lists(st.sampled_from("abc"), max_size=7)


def subsequences(items):
    return {
        tuple(items[i] for i in chosen) for n in range(len(items) + 1) for chosen in combinations(range(len(items)), n)
    }


@given(TEXTS, TEXTS)
def test_the_longest_common_subsequence_is_that_of_a_search(first, second):
    expected = max(map(len, subsequences(first) & subsequences(second)))
    assert longest_common_subsequence(first, second) == expected


@given(TEXTS, TEXTS)
def test_rouge_l_is_the_f1_of_precision_and_recall(first, second):
    common = max(map(len, subsequences(first) & subsequences(second)))
    if first and second and common:
        precision, recall = common / len(first), common / len(second)
        expected = 2 * precision * recall / (precision + recall)
    else:
        expected = float(first == second)
    assert rouge_l(" ".join(first), " ".join(second)) == pytest.approx(expected)


def test_rouge_l_of_lin_s_example():
    """Lin (2004), section 3.1: the first shares three of four words in order, the second two."""
    assert rouge_l("police kill the gunman", "police killed the gunman") == 0.75
    assert rouge_l("the gunman kill police", "police killed the gunman") == 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog, the dog!", ["the", "dog", "the", "dog"]),
        ("Straße", ["strasse"]),
        ("红色方块 moves", ["红", "色", "方", "块", "moves"]),
        ("犬がcatを", ["犬", "が", "cat", "を"]),
        ("... !", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_texts_without_words():
    assert rouge_l("", "...") == 1
    assert rouge_l("", "a dog") == rouge_l("a dog", "") == 0


# --- divergence


def definition(first, second):
    """KL by its formula, one probability at a time."""
    p, q = ([math.exp(x - max(row)) for x in row] for row in (first, second))
    p, q = ([x / sum(row) for x in row] for row in (p, q))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


@settings(max_examples=30)
@given(st.integers(1, 2 * CHUNK + 3), st.integers(2, 9), st.integers(0, 99))
def test_kl_is_its_definition_whatever_the_chunk(steps, vocabulary, seed):
    make = np.random.default_rng(seed)
    first, second = (make.normal(0, 3, (steps, vocabulary)) for _ in range(2))
    found = kl_divergence(torch.tensor(first), torch.tensor(second))
    expected = [definition(list(a), list(b)) for a, b in zip(first, second, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_distribution_does_not_diverge_from_itself_in_any_type():
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 10
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kl_divergence(logits.to(dtype), logits.to(dtype)).max() == 0
    assert kl_divergence(logits, logits + 3).max() < 1e-9  # the same distribution, by other logits


def test_logits_that_differ_by_d_diverge_by_half_of_d_squared_at_most():
    make = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 50, generator=make, dtype=torch.float64) * 5
    for d in (1e-4, 1e-2, 1.0):
        other = logits + d * (2 * torch.rand(logits.shape, generator=make, dtype=torch.float64) - 1)
        assert 0 < kl_divergence(logits, other).max() <= d * d / 2


def test_impossible_tokens_are_those_of_the_unpruned_model_only():
    ruled_out, free = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[0.0, 1.0, 0.5]])
    assert kl_divergence(ruled_out, ruled_out).item() == 0
    assert 0 < kl_divergence(ruled_out, free).item() < torch.inf
    for bad in (kl_divergence, lambda a, b: kl_divergence(a * torch.nan, b)):
        with pytest.raises(FastAVError, match="not finite"):
            bad(free, ruled_out)


@pytest.mark.parametrize(("finish", "counted"), [("stop", 3), ("length", 2)])
def test_the_end_marker_counts_where_the_answer_ended(finish, counted):
    one = Saving(1, 1)
    answer = Answer(
        text="a b",
        token_ids=(4, 5),
        finish=finish,
        plan="none",
        prompt_tokens={},
        tokens_per_layer=(),
        flops=one,
        kv_bytes=one,
        seconds={},
        peak_bytes=None,
    )
    first, second = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1))
    values = kl_divergence(first, second)[:counted]
    found = Divergence.of(answer, first, second)
    assert (found.mean, found.max) == pytest.approx((float(values.mean()), float(values.max())))


# --- over questions


def test_the_bootstrap_is_the_same_every_time_and_contains_the_mean():
    values = list(np.random.default_rng(0).exponential(size=40))
    low, high = statistics.bootstrap_interval(values)
    assert (low, high) == statistics.bootstrap_interval(values)
    assert low < np.mean(values) < high


def test_the_bootstrap_is_near_the_normal_interval_of_many_values():
    values = np.random.default_rng(1).normal(5, 2, 2000)
    low, high = statistics.bootstrap_interval(list(values))
    half = statistics.Z * values.std(ddof=1) / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_the_bootstrap_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(2).exponential(size=30)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(3))
    ours = statistics.bootstrap_interval(list(values))
    assert ours == pytest.approx(tuple(theirs.confidence_interval), rel=0.02)


def test_few_values():
    assert statistics.bootstrap_interval([0.5]) is None
    assert statistics.bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)
    assert statistics.share([]) is statistics.divergence([]) is None
    assert statistics.divergence([{"mean": 1.0, "max": 3.0}]) == {"mean": 1.0, "interval": None, "max": 3.0}


def test_an_agreement_has_equal_texts_equal_first_tokens_and_rouge_l():
    found = Agreement.of("a red drum", [1, 2, 3], "a blue drum", [1, 5, 3])
    assert found == Agreement(exact=False, first_token=True, rouge_l=2 / 3)
    assert Agreement.of("yes", [7], "yes", [7]) == Agreement(exact=True, first_token=True, rouge_l=1.0)
    assert Agreement.of("", (), "", []) == Agreement(exact=True, first_token=True, rouge_l=1.0)
    assert not Agreement.of("", [], "yes", [7]).first_token
