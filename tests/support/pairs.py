"""Products of parameters of which `make test` runs as many as hold each pair of values."""

from collections.abc import Collection
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*axes: Collection[Any]) -> list[Any]:
    """All combinations of parameters; those that hold no further pair of values of two axes are marked as slow.

    For axes that the code sees to in different places: a fault of one of them shows with whatever values of the
    others, and one of two together in the combination that holds these two.
    """
    every = list(product(*axes))
    open_pairs = {pair for one in every for pair in _pairs(one)}
    chosen = set()
    while open_pairs:
        best = max(every, key=lambda one: len(open_pairs.intersection(_pairs(one))))  # of equals the first
        chosen.add(best)
        open_pairs.difference_update(_pairs(best))
    return [pytest.param(*one, marks=[] if one in chosen else pytest.mark.slow) for one in every]


def _pairs(one: tuple[Any, ...]) -> list[Any]:
    return list(combinations(enumerate(one), 2))
