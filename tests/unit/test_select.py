"""`select`, and what the engine calls in its place, against a literal definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastav.errors import PlanError
from fastav.layout import MEDIA, Modality
from fastav.pruning.selection import SelectionGroups, select, select_grouped, select_uniform

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


SCORES = st.sampled_from([-1e30, -0.5, -0.0, 0.0, 0.25, 1.0])


@st.composite
def rows(draw):
    length = draw(st.integers(1, 24))
    batch = []
    for _ in range(draw(st.integers(1, 3))):
        pad = draw(st.integers(0, length - 1))
        tokens = draw(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=length - pad - 1, max_size=length - pad - 1))
        scores = draw(st.lists(SCORES, min_size=length, max_size=length))
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


@st.composite
def even_rows(draw):
    """Rows of one pool that keep equally many tokens, of different numbers of tokens."""
    pool = draw(st.sampled_from(POOLS))
    inside, outside = list(pool), [m for m in Modality if m not in pool]
    exempt = draw(st.integers(0, 6)) if outside else 0
    ends_inside = not outside or draw(st.booleans())
    count = draw(st.integers(int(ends_inside), 6))
    batch, length = [], 24
    for _ in range(draw(st.integers(1, 3))):
        members = draw(st.integers(count, 12))
        tokens = [draw(st.sampled_from(inside)) for _ in range(members - ends_inside)]
        tokens += [draw(st.sampled_from(outside)) for _ in range(exempt)]
        tokens = [*draw(st.permutations(tokens)), draw(st.sampled_from(inside if ends_inside else outside))]
        row = [-1] * (length - len(tokens)) + [int(m) for m in tokens]
        batch.append((row, draw(st.lists(SCORES, min_size=length, max_size=length))))
    return batch, pool, count, exempt + count + (not ends_inside)


@given(even_rows())
def test_where_rows_keep_equally_many_the_short_way_equals_the_literal_definition(case):
    batch, pool, count, width = case
    expected = [literal(scores, row, [(pool, count)]) for row, scores in batch]
    scores, modality = (torch.tensor(part) for part in ([s for _, s in batch], [row for row, _ in batch]))
    bias, _ = SelectionGroups.of(modality, [pool])
    assert select_uniform(scores, bias, width).tolist() == expected
    index, real = select(scores, modality, [(pool, torch.full((len(batch),), count))], width)
    assert index.tolist() == expected
    assert real.all()


def test_a_groups_is_known_of_tokens_that_are_picked_out_of_all():
    """Slots point to the last column where a row has fewer tokens; the last token is that of the column before."""
    modality = torch.tensor([[1, 2, 0, 1, 0, -1], [-1, 0, 1, 2, 2, -1]])
    slots = torch.tensor([[0, 1, 3, 4], [5, 2, 3, 4]])
    groups = SelectionGroups.of(modality, [POOLS[0], POOLS[1]], last=4)
    limits = torch.tensor([[1, 1, 6, 0], [1, 1, 6, 0]])
    bias, group = (part.gather(1, slots) for part in groups)
    index, real = select_grouped(torch.zeros(2, 4), bias, group, limits, 3)
    assert index[0].tolist() == [0, 1, 3]
    assert index[1, real[1]].tolist() == [1, 3]
    assert real.tolist() == [[True, True, True], [False, True, True]]


def test_a_nan_score_is_refused():
    with pytest.raises(PlanError, match="NaN"):
        select(torch.tensor([[0.0, torch.nan]]), torch.tensor([[1, 0]]), [], 2)


def test_scores_are_left_as_they_were():
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    select(scores, torch.tensor([[1, 1, 0]]), [(POOLS[0], torch.tensor([1]))], 2)
    assert scores.tolist() == [[0.0, 1.0, 2.0]]
