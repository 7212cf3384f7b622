"""`select` against a literal definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastav.errors import PlanError
from fastav.layout import MEDIA, Modality
from fastav.method import select

POOLS = [frozenset({Modality.AUDIO}), frozenset({Modality.VIDEO}), frozenset(MEDIA), frozenset(Modality)]


def literal(scores, modality, counts):
    """One row: sort every pool by (score, earliness), keep its first `count`; keep what no pool holds."""
    last = len(scores) - 1
    keep = {i for i, m in enumerate(modality) if m >= 0}
    for pool, count in counts:
        members = [i for i in keep if modality[i] in pool]
        ranked = sorted(members, key=lambda i: (i != last, -scores[i], i))
        keep -= set(ranked[count:])
    return sorted(keep)


@st.composite
def rows(draw):
    length = draw(st.integers(1, 24))
    batch = []
    for _ in range(draw(st.integers(1, 3))):
        pad = draw(st.integers(0, length - 1))
        tokens = draw(st.lists(st.sampled_from([0, 1, 2]), min_size=length - pad - 1, max_size=length - pad - 1))
        scores = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=length, max_size=length))
        batch.append(([-1] * pad + tokens + [0], scores))
    choice = draw(st.sampled_from([[POOLS[0], POOLS[1]], [POOLS[1]], [POOLS[2]], [POOLS[3]]]))
    shares = draw(st.lists(st.floats(0, 1), min_size=len(choice), max_size=len(choice)))
    return batch, choice, shares


@given(rows())
def test_select_equals_the_literal_definition(case):
    batch, pools, shares = case
    counts = [
        [max(int(s * sum(m in pool for m in row)), int(Modality.TEXT in pool)) for row, _ in batch]
        for pool, s in zip(pools, shares, strict=True)
    ]
    expected = [
        literal(scores, row, [(pool, c[b]) for pool, c in zip(pools, counts, strict=True)])
        for b, (row, scores) in enumerate(batch)
    ]
    width = max(map(len, expected))
    index, real = select(
        torch.tensor([scores for _, scores in batch]),
        torch.tensor([row for row, _ in batch]),
        [(pool, torch.tensor(c)) for pool, c in zip(pools, counts, strict=True)],
        width,
    )
    assert index.shape == real.shape == (len(batch), width)
    for b, kept in enumerate(expected):
        assert index[b, real[b]].tolist() == kept
        assert real[b].tolist() == [False] * (width - len(kept)) + [True] * len(kept)


def test_a_nan_score_is_refused():
    with pytest.raises(PlanError, match="NaN"):
        select(torch.tensor([[0.0, torch.nan]]), torch.tensor([[1, 0]]), [], 2)


def test_scores_are_left_as_they_were():
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    select(scores, torch.tensor([[1, 1, 0]]), [(POOLS[0], torch.tensor([1]))], 2)
    assert scores.tolist() == [[0.0, 1.0, 2.0]]
