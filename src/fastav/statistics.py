"""Statistics of scores and their uncertainty.  Pure functions; docs/eval.md defines them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float

Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 10_000  # of the bootstrap
BLOCK = 1 << 20  # values that are resampled at a time

Scores = Sequence[float | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The difference of a plan's scores to another plan's on the same samples, of 100 points.

    n: samples. low, high: 95 % interval. p: of the exact McNemar test; None if scores are not all 0 or 1.
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
    """The standard error of the mean: binomial if all scores are 0 or 1, else the sample's.

    None for a single score between 0 and 1.
    """
    n, m = len(scores), mean(scores)
    if _is_binary(scores):
        return sqrt(m * (1 - m) / n)
    return float(np.std(scores, ddof=1)) / sqrt(n) if n > 1 else None


def interval(scores: Scores) -> tuple[float, float]:
    """Wilson's 95 % score interval of the mean of at least one score in [0, 1].

    It lies in [0, 1], contains the mean, and has a positive width also if all answers are right or all wrong. It is
    made for zeros and ones. Scores in between vary less than zeros and ones of the same mean, so for them it is too
    wide, never too narrow.
    """
    n, m = len(scores), mean(scores)
    middle, half = m + Z * Z / (2 * n), Z * sqrt(m * (1 - m) / n + Z * Z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + Z * Z / n) for sign in (-1, 1))
    return min(max(0.0, low), m), max(min(1.0, high), m)


def bootstrap_interval(values: Scores) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of the mean of values without a bound; None for a single one.

    It is the same in every call. It contains the mean. For few values it is too narrow, and it has no width if all are
    equal.
    """
    sample, generator = np.asarray(values, np.float64), np.random.default_rng(0)
    n, m = len(sample), mean(values)
    if n < 2:
        return None
    rows = max(1, BLOCK // n)
    means = [
        sample[generator.integers(n, size=(min(rows, RESAMPLES - start), n))].mean(1)
        for start in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return min(float(low), m), max(float(high), m)


def share(values: Scores) -> dict[str, Any] | None:
    """`mean` and `interval` of values in [0, 1]; None without values."""
    return {"mean": mean(values), "interval": list(interval(values))} if values else None


def divergence(values: Sequence[Mapping[str, float | int]]) -> dict[str, Any] | None:
    """`mean` and bootstrap `interval` of mean divergences, and the largest `max`; None without values.

    values: of each question, the `mean` over tokens and the `max`.
    """
    if not values:
        return None
    means = [value["mean"] for value in values]
    bounds = bootstrap_interval(means)
    return {
        "mean": mean(means),
        "interval": None if bounds is None else list(bounds),
        "max": max(value["max"] for value in values),
    }


def difference(scores: Scores, reference: Scores) -> Difference:
    """The difference of two plans' scores on the same samples, in the same order."""
    gains = np.subtract(scores, reference, dtype=np.float64)
    low, high = paired_interval(gains)
    binary = _is_binary(scores) and _is_binary(reference)
    return Difference(
        n=len(gains),
        points=100 * float(gains.mean()),
        low=100 * low,
        high=100 * high,
        p=mcnemar(int((gains > 0).sum()), int((gains < 0).sum())) if binary else None,
    )


def paired_interval(gains: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """The 95 % interval of the mean of gains in [-1, 1]: Wald's, after adding one gain of +1 and one of -1.

    It contains the mean, and has a positive width if all gains are equal. For differences of zeros and ones it is the
    interval of Bonett and Price (2012, Journal of Educational and Behavioral Statistics 37).
    """
    adjusted, m = np.concatenate([gains, [1.0, -1.0]]), float(gains.mean())
    middle, half = float(adjusted.mean()), Z * float(adjusted.std()) / sqrt(len(adjusted))
    return min(max(-1.0, middle - half), m), max(min(1.0, middle + half), m)


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p value of the exact McNemar test: of a split as uneven or more, if a fair coin decided each one.

    gained, lost: the numbers of samples that only the one plan, or only the other, answers correctly.
    """
    n = gained + lost
    tail = term = 1  # C(n, k) at k = 0, and the sum of C(n, k) so far
    for k in range(min(gained, lost)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def _is_binary(scores: Scores) -> bool:
    return all(score in (0, 1) for score in scores)
