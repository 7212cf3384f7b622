"""What scores say, and how sure of it one can be.  Pure functions, defined in docs/eval.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np
from jaxtyping import Float

SEED = 0
RESAMPLES = 10_000
_AT_ONCE = 500  # resamples, which bounds the memory that real-valued scores of many samples take

Scores = Sequence[float | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much better a plan scores than another on the same samples, in points of 100.

    n: samples. low, high: 95 % interval. p: of the exact McNemar test; None where scores are not all 0 or 1.
    """

    n: int
    points: float
    low: float
    high: float
    p: float | None


def mean(scores: Scores) -> float:
    """The mean of at least one score."""
    return float(np.mean(scores))


def standard_error(scores: Scores) -> float | None:
    """Of the mean: binomial if all scores are 0 or 1, else the sample's; None of a single other score."""
    n, m = len(scores), mean(scores)
    if _is_binary(scores):
        return sqrt(m * (1 - m) / n)
    return float(np.std(scores, ddof=1)) / sqrt(n) if n > 1 else None


def difference(scores: Scores, reference: Scores, seed: int = SEED) -> Difference:
    """Of two plans' scores on the same samples, in the same order."""
    gains = np.subtract(scores, reference, dtype=np.float64)
    low, high = np.quantile(resampled_means(gains, seed), [0.025, 0.975])
    binary = _is_binary(scores) and _is_binary(reference)
    return Difference(
        n=len(gains),
        points=100 * float(gains.mean()),
        low=100 * float(low),
        high=100 * float(high),
        p=mcnemar(int((gains > 0).sum()), int((gains < 0).sum())) if binary else None,
    )


def resampled_means(values: Float[np.ndarray, " n"], seed: int) -> Float[np.ndarray, " resamples"]:
    """Means of samples drawn from `values` with replacement, as many as they are.

    Only how often each distinct value is drawn matters, which is multinomial; so the order of `values` does not.
    """
    distinct, counts = np.unique(values, return_counts=True)
    generator, n = np.random.default_rng(seed), len(values)
    draws = (generator.multinomial(n, counts / n, size=_AT_ONCE) for _ in range(RESAMPLES // _AT_ONCE))
    return np.concatenate([drawn @ distinct / n for drawn in draws])


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of as uneven a split or more, if each sample on which two plans differ were a fair coin's toss.

    gained, lost: samples that only the one, or only the other, gets right.
    """
    n = gained + lost
    tail = sum(comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def _is_binary(scores: Scores) -> bool:
    return all(score in (0, 1) for score in scores)
