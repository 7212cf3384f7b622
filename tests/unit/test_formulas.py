"""Methods against a literal reading of their papers: loops over tokens, one row at a time, nothing shared."""

from dataclasses import replace
from math import ceil, exp, floor, isnan, nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.budgets import Share
from fastav.errors import PlanError
from fastav.layout import Layout, Modality
from fastav.method import Signal, View, method_of
from fastav.methods._order import earlier, ranks, temporal_ranks
from fastav.plan import Keep, Step
from fastav.pruning.device_layout import batch_layout
from fastav.pruning.selection import SelectionGroups, select
from fastav.registry import METHODS

TEXT, AUDIO, VIDEO = Modality.TEXT, Modality.AUDIO, Modality.VIDEO


def layout(*parts: tuple[Modality, int, int, float]) -> Layout:
    """Runs of (modality, tokens, frame, second)."""
    return Layout.join(
        Layout.of(m, n, frame=np.full(n, frame), second=np.full(n, second, np.float32)) for m, n, frame, second in parts
    )


# video in frames of three that count in twos, and sound between them; one frame is shorter; sound after it all
MIXED = layout(
    (TEXT, 2, -1, nan),
    *(run for f in range(0, 14, 2) for run in ((VIDEO, 3 - (f == 6), f, f / 1), (AUDIO, 2, f, f / 1))),
    (AUDIO, 3, -1, nan),
    (TEXT, 4, -1, nan),
)
APART = layout((TEXT, 1, -1, nan), *((VIDEO, 4, f, 0.5 * f) for f in range(5)), (AUDIO, 9, -1, 3.0), (TEXT, 3, -1, nan))
SILENT = layout((TEXT, 2, -1, nan), (VIDEO, 5, -1, nan), (TEXT, 2, -1, nan))


def second_item(one: Layout) -> Layout:
    """The layout as that of a prompt's second clip."""
    return replace(one, item=np.where(one.item >= 0, 1, -1).astype(np.int32))


TWO = Layout.join([APART, second_item(MIXED)])
LAYOUTS = [MIXED, APART, SILENT, layout((TEXT, 4, -1, nan)), TWO]


def view_of(layouts, *, seed=0, attention=None, hidden=None, drop=0, kept=None):
    """A left-padded batch, from which the columns of `drop` tokens are gone already.  kept: by pool."""
    make = torch.Generator().manual_seed(seed)
    length = max(map(len, layouts))
    columns = batch_layout(layouts, length, torch.device("cpu"))
    slots = torch.arange(drop, length).expand(len(layouts), -1)
    shape = len(layouts), length - drop
    scores = torch.rand(shape, generator=make) if attention is None else attention
    signals = dict.fromkeys(Signal, scores / scores.sum(1, keepdim=True))
    signals[Signal.HIDDEN_STATES] = torch.randn(*shape, 6, generator=make) if hidden is None else hidden
    signals[Signal.KEYS] = torch.randn(len(layouts), 2, shape[1], 3, generator=make)
    return View(
        layer=3,
        layout=columns,
        slots=slots,
        pool=columns.modality if kept is None else SelectionGroups.of(columns.modality, list(kept)).group,
        signals=signals,
        method="-",
        needs=frozenset(Signal),
        kept=kept,
    )


def rows(view):
    """Indices of each row's real tokens."""
    for row in range(view.slots.shape[0]):
        yield row, [i for i in range(view.slots.shape[1]) if view.modality[row, i] >= 0]


def cosine(a, b):
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def before(view, row, i, steps):
    """The token that shows the same part so many times earlier, found by looking for it."""
    modality, frame, item = view.modality[row], view.frame[row], view.item[row]
    if modality[i] == AUDIO:
        line = [j for j in range(i + 1) if modality[j] == AUDIO and item[j] == item[i]]
    elif modality[i] > AUDIO and frame[i] < 0:  # what has no frame goes token by token
        line = [j for j in range(i + 1) if modality[j] == modality[i] and frame[j] < 0 and item[j] == item[i]]
    elif modality[i] == TEXT:
        line = [i]
    else:
        same = [
            j
            for j in range(len(modality))
            if modality[j] == modality[i] and view.place[row, j] == view.place[row, i] and item[j] == item[i]
        ]
        line = sorted((j for j in same if frame[j] <= frame[i]), key=lambda j: int(frame[j]))
    return line[-1 - steps] if steps < len(line) else None, len(line) - 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_ranks_are_what_sorting_each_group_gives(tokens):
    group = torch.tensor([[g for g, _ in tokens]])
    score = torch.tensor([[s for _, s in tokens]]).float()
    found = ranks(score, group)
    for i, (g, _) in enumerate(tokens):
        mine = [j for j, (other, _) in enumerate(tokens) if other == g]
        order = sorted(mine, key=lambda j: (-tokens[j][1], j))
        assert found.rank[0, i] == order.index(i)
        assert found.size[0, i] == len(mine)
    assert found.order[0].tolist() == sorted(range(len(tokens)), key=lambda j: (tokens[j][0], -tokens[j][1], j))


@pytest.mark.parametrize("drop", [0, 4])
def test_courses_go_through_the_frames_that_are_there(drop):
    view = view_of(LAYOUTS, drop=drop)
    found = temporal_ranks(view)
    for row, real in rows(view):
        for i in real:
            previous, turn = before(view, row, i, 1)
            assert found.rank[row, i] == turn
            if previous is not None:
                assert earlier(found.order, 1)[row, i] == previous


def test_evs_is_the_change_since_the_frame_before():
    view = view_of(LAYOUTS)
    scores = METHODS["evs"]().score(view)
    for row, real in rows(view):
        for i in real:
            previous, _ = before(view, row, i, 1)
            expected = 3.0 if previous is None else 1 - cosine(view.hidden[row, i], view.hidden[row, previous])
            assert scores[row, i] == pytest.approx(expected, abs=1e-5)


def test_evs_keeps_the_first_frame_of_a_still_picture():
    view = view_of([APART], hidden=torch.ones(1, len(APART), 6))
    video = METHODS["evs"]().score(view)[0, 1:21]
    assert video.argsort(descending=True, stable=True)[:4].tolist() == [0, 1, 2, 3]


def test_dycoke_drops_the_same_share_of_three_frames_in_four():
    view = view_of(LAYOUTS)
    scores = METHODS["dycoke"]().score(view)
    for row, real in rows(view):
        like, whole = {}, []
        for i in real:
            turn = before(view, row, i, 0)[1]
            if turn % 4 == 0:
                whole.append(i)
            else:
                other, _ = before(view, row, i, 2 if turn % 4 == 2 else 1)
                like[i] = cosine(view.hidden[row, i], view.hidden[row, other])
        assert all(1 < score <= 2 for score in scores[row, whole])
        for i, likeness in like.items():
            same = [
                j
                for j in like
                if view.modality[row, j] == view.modality[row, i]
                and view.item[row, j] == view.item[row, i]
                and (view.modality[row, i] == AUDIO or view.frame[row, j] == view.frame[row, i])
            ]
            expected = -sum(like[j] < likeness for j in same) / len(same)
            assert scores[row, i] == pytest.approx(expected)


def greedy(view, row, member, weight=None):
    """Farthest point by farthest point, from whole distance matrices.  weight: of each candidate's distances."""
    weight = dict.fromkeys(member, 1.0) if weight is None else {i: float(weight[row, i]) for i in member}
    distance = {
        (i, j): weight[i] * (1 - cosine(view.hidden[row, i], view.hidden[row, j])) for i in member for j in member
    }
    first = max(member, key=lambda i: (min((distance[i, j] for j in member if j != i), default=0), -i))
    chosen = [first]
    while len(chosen) < len(member):
        rest = [i for i in member if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(distance[i, j] for j in chosen), -i)))
    return chosen


def test_divprune_is_the_greedy_choice_of_each_modality():
    view = view_of(LAYOUTS)
    scores = METHODS["divprune"]().score(view)
    for row, real in rows(view):
        for m in Modality:
            member = [i for i in real if view.modality[row, i] == m]
            if member:
                assert sorted(member, key=lambda i: -scores[row, i]) == greedy(view, row, member)


def test_divprune_takes_the_farther_token_of_whatever_modality():
    view = view_of([APART], seed=5)
    hidden = view.hidden[0]
    order = METHODS["divprune"]().score(view)[0].argsort(descending=True).tolist()
    chosen, last = [], []
    for i in order:
        same = [j for j in chosen if view.modality[0, j] == view.modality[0, i]]
        last.append(min((1 - cosine(hidden[i], hidden[j]) for j in same), default=9.0))
        chosen.append(i)
    assert last == sorted(last, reverse=True)


def test_divprune_with_a_limit_ranks_the_rest_by_distance():
    view = view_of([APART, MIXED])
    whole, limited = METHODS["divprune"]().score(view), METHODS["divprune"](limit=5).score(view)
    assert torch.equal(whole > -5, limited > -5)
    assert sorted(-limited[0].int()) == list(range(limited.shape[1]))
    rest = [i for i in range(limited.shape[1]) if limited[1, i] <= -5]
    chosen = [i for i in range(limited.shape[1]) if limited[1, i] > -5]
    far = {
        i: min((1 - cosine(view.hidden[1, i], view.hidden[1, j]) for j in chosen if same(view, i, j)), default=9.0)
        for i in rest
    }
    known = [i for i in sorted(rest, key=lambda i: -limited[1, i]) if far[i] < 9]
    assert [far[i] for i in known] == sorted((far[i] for i in known), reverse=True)


def same(view, i, j):
    return view.modality[1, i] == view.modality[1, j]


KEEPS = [
    {frozenset({VIDEO}): 4, frozenset({AUDIO}): 3},
    {frozenset({AUDIO}): 2},
    {frozenset({AUDIO, VIDEO, Modality.IMAGE}): 9},
    {frozenset({VIDEO}): 0, frozenset({AUDIO}): 100},
]


def chosen(view, scores, kept, modality):
    """The tokens that `select` keeps in every row."""
    counts = [(pool, torch.full((len(view.slots),), n)) for pool, n in kept.items()]
    index, valid = select(scores, modality, counts, view.slots.shape[1])
    return [set(row[real].tolist()) for row, real in zip(index, valid, strict=True)]


@pytest.mark.parametrize("name", ["divprune", "window-diversity"])
@pytest.mark.parametrize("kept", KEEPS)
@pytest.mark.parametrize("drop", [0, 6])
def test_diversity_that_stops_at_the_budget_keeps_what_a_whole_order_keeps(name, kept, drop):
    for seed in range(5):
        whole, stops = (view_of(LAYOUTS, seed=seed, drop=drop, kept=one) for one in (None, kept))
        method = METHODS[name]()
        orders = [chosen(view, method.score(view), kept, view.modality) for view in (whole, stops)]
        assert orders[0] == orders[1]


def windows_of(view, row, real, frames, seconds):
    """The windows of a row's remaining tokens: two frames, some seconds of sound, an image."""
    groups = {}
    for i in real:
        if view.modality[row, i] == TEXT:
            continue
        item, kind = int(view.item[row, i]), int(view.modality[row, i])
        layout = view.layouts[row]
        own = (layout.item == item) & (layout.modality == kind)
        if kind == AUDIO:
            if np.isnan(layout.second[own]).any():
                number = int(own[: view.position[row, i]].sum()) // 50
            else:
                number = floor(float(view.second[row, i]) / seconds + 1e-6)
        else:
            number = sorted(set(layout.frame[own].tolist())).index(int(view.frame[row, i])) // frames
        groups.setdefault((item, kind, number), []).append(i)
    return groups


@pytest.mark.parametrize("options", [{}, {"frames": 1, "seconds": 1}, {"frames": 3, "seconds": 4.5}])
@pytest.mark.parametrize("drop", [0, 5])
def test_window_diversity_is_the_greedy_choice_of_each_window(options, drop):
    view = view_of(LAYOUTS, drop=drop)
    scores = METHODS["window-diversity"](**options).score(view)
    for row, real in rows(view):
        groups = windows_of(view, row, real, options.get("frames", 2), options.get("seconds", 2))
        for member in groups.values():
            order = sorted(member, key=lambda i: -scores[row, i])
            kind = Signal.AUDIO_ENCODER if view.modality[row, member[0]] == AUDIO else Signal.VISION_ENCODER
            assert order == greedy(view, row, member, view[kind])
            for rank, i in enumerate(order):
                assert (
                    2 < scores[row, i] <= 3
                    if rank == 0
                    else scores[row, i] == pytest.approx(-(rank + 0.5) / len(order))
                )
        assert all(scores[row, i] == 4 for i in real if view.modality[row, i] == TEXT)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 9), st.floats(0.05, 1))
def test_windows_keep_their_share_and_at_least_one_token(n_frames, per_frame, short, share):
    parts = [(VIDEO, max(1, per_frame - short * (f % 3 == 0)), f, f / 2) for f in range(n_frames)]
    one = layout((TEXT, 2, -1, nan), *parts, (TEXT, 2, -1, nan))
    n = one.count(VIDEO)
    kept = {frozenset({VIDEO}): max(1, round(share * n))}
    view = view_of([one], kept=kept)
    scores = METHODS["window-diversity"]().score(view)
    (stays,) = chosen(view, scores, kept, view.modality)
    groups = windows_of(view, 0, range(len(one)), 2, 2)
    counts = [(len(set(member) & stays), len(member)) for member in groups.values()]
    k = kept[frozenset({VIDEO})]
    if k >= len(counts):
        assert min(n_kept for n_kept, _ in counts) >= 1
    for n_kept, size in counts:  # by Webster's method the share is met to a token, but for what minima take
        assert n_kept <= size * (k + len(counts) / 2) / n + 1.5


def runs_of(view, row, real):
    """Runs of media of one modality and item in the unpruned prompt, as lists of the tokens that remain of each."""
    layout, place = view.layouts[row], {int(view.position[row, i]): i for i in real}
    found, last = [], None
    for position in range(len(layout)):
        kind = (int(layout.modality[position]), int(layout.item[position]))
        if kind[0] == TEXT:
            continue
        if kind != last:
            found.append((kind[0], []))
            last = kind
        if position in place:
            found[-1][1].append(place[position])
    return found


def quotas(view, row, real, temperature):
    """The weight of each run, literally."""
    attention = view[Signal.OWN_LAST_QUERY][row]
    found = runs_of(view, row, real)
    if temperature is None:
        return [(member, sum(float(attention[i]) for i in member)) for _, member in found]
    softmax, total, number = {}, {}, {}
    for is_sound in (True, False):
        own = [n for n, (kind, _) in enumerate(found) if (kind == AUDIO) == is_sound]
        number |= {n: k for k, n in enumerate(own)}
        own = [n for n in own if found[n][1]]
        powers = {n: exp(float(attention[found[n][1]].mean()) / temperature) for n in own}
        softmax |= {n: power / sum(powers.values()) for n, power in powers.items()}
        total |= dict.fromkeys(own, sum(len(found[n][1]) for n in own))
    weights = []
    for n, (_, member) in enumerate(found):
        if not member:
            weights.append((member, 0.0))
            continue
        window = [other for other in softmax if number[other] == number[n]]
        mean = sum(softmax[other] for other in window) / len(window)
        shares = {other: softmax[other] * total[other] for other in window}
        weights.append((member, mean * shares[n] / sum(shares.values())))
    return weights


@pytest.mark.parametrize("temperature", [None, 0.1, 1.0])
@pytest.mark.parametrize("drop", [0, 5])
def test_window_quotas_are_websters_of_the_attention_of_runs(temperature, drop):
    for seed in range(3):
        view = view_of(LAYOUTS, seed=seed, drop=drop)
        scores = METHODS["window-quotas"](temperature=temperature).score(view)
        for row, real in rows(view):
            for member, weight in quotas(view, row, real, temperature):
                order = sorted(member, key=lambda i: (-float(view[Signal.OWN_LAST_QUERY][row, i]), i))
                for rank, i in enumerate(order):
                    assert rank > 0 or 2 < scores[row, i] <= 3
                    assert rank == 0 or scores[row, i] == pytest.approx(-(rank + 0.5) / weight, rel=1e-4)
            assert all(scores[row, i] == 4 for i in real if view.modality[row, i] == TEXT)


def test_quotas_give_windows_tokens_in_proportion_to_their_weights():
    runs = [(VIDEO, 40, 0, 0.0), (AUDIO, 40, 0, 0.0), (VIDEO, 40, 2, 2.0), (AUDIO, 40, 2, 2.0)]
    one = layout((TEXT, 3, -1, nan), *runs, (TEXT, 3, -1, nan))
    attention = torch.zeros(1, len(one))
    for n, weight in enumerate((4.0, 2.0, 1.0, 1.0)):
        attention[0, 3 + 40 * n : 43 + 40 * n] = weight / 40
    view = view_of([one], attention=attention)
    scores, kept = METHODS["window-quotas"]().score(view), {frozenset({AUDIO, VIDEO}): 48}
    (stays,) = chosen(view, scores, kept, view.modality)
    assert [len([i for i in stays if 3 + 40 * n <= i < 43 + 40 * n]) for n in range(4)] == [24, 12, 6, 6]


def test_divprune_of_equal_tokens_goes_in_order():
    view = view_of([SILENT], hidden=torch.ones(1, len(SILENT), 6))
    video = METHODS["divprune"]().score(view)[0, 2:7]
    assert video.tolist() == sorted(video.tolist(), reverse=True)


@pytest.mark.parametrize("options", [{}, {"pivots": 1, "texts": 0}, {"pivots": 2, "texts": 3}])
def test_dart_is_the_union_of_the_pivots_lists(options):
    view = view_of(LAYOUTS)
    scores = METHODS["dart"](**options).score(view)
    for row, real in rows(view):
        norm = {i: float(view.keys[row, :, i].abs().sum()) for i in real}
        last = max((i for i in real if view.modality[row, i] != TEXT), default=-1)
        asked = [i for i in real if i > last or i == real[-1]]
        texts = sorted(asked, key=lambda i: -norm[i])[: options.get("texts", 4)]
        for m in (AUDIO, VIDEO):
            member = [i for i in real if view.modality[row, i] == m]
            pivots = sorted(member, key=lambda i: -norm[i])[: options.get("pivots", 4)]
            others = [i for i in member if i not in pivots]
            lists = [
                sorted(others, key=lambda i, p=p: cosine(view.hidden[row, i], view.hidden[row, p]))
                for p in [*pivots, *(t for t in texts if t > last)]
            ]
            for i in pivots:
                assert scores[row, i] == 1
            for i in others:
                expected = -min(listed.index(i) for listed in lists) / len(others)
                assert scores[row, i] == pytest.approx(expected)


def test_vidcom2_is_its_formula():
    view = view_of(LAYOUTS)
    scores = METHODS["vidcom2"]().score(view)
    for row, real in rows(view):
        video = [i for i in real if view.modality[row, i] == VIDEO]
        others = [i for i in real if i not in video]
        assert scores[row, others].tolist() == [-len(video)] * len(others)
        if not video:
            continue
        x = view.hidden[row, video].double().numpy()
        x = x[:, np.argsort(x.var(0), kind="stable")[:3]]
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        alike = lambda v, c: sum(exp(-((v - c) ** 2).sum() / (2 * 2.0**k)) for k in range(-3, 2))  # noqa: E731
        items = [int(view.item[row, i]) for i in video]
        frames = [(item, int(view.frame[row, i])) for item, i in zip(items, video, strict=True)]
        centre = {item: x[[k for k, one in enumerate(items) if one == item]].mean(0) for item in items}
        to_video = [alike(v, centre[item]) for v, item in zip(x, items, strict=True)]
        own = {f: x[[k for k, g in enumerate(frames) if g == f]].mean(0) for f in set(frames)}
        both = [a + alike(v, own[f]) for a, v, f in zip(to_video, x, frames, strict=True)]
        unusual = {f: -np.mean([a for a, g in zip(to_video, frames, strict=True) if g == f]) for f in own}
        top = max(unusual.values())
        odds = {f: exp((u - top) / 0.01) for f, u in unusual.items()}
        weight = {f: 1 + o / sum(odds.values()) - 1 / len(odds) for f, o in odds.items()}
        share = {}
        for k, i in enumerate(video):
            mine = [j for j in range(len(video)) if frames[j] == frames[k]]
            rank = sum(both[j] < both[k] for j in mine)
            share[i] = (rank + 0.5) / (len(mine) * weight[frames[k]])
        assert sorted(video, key=lambda i: -scores[row, i]) == sorted(video, key=lambda i: (share[i], i))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.2, 0.5, 0.9]), st.sampled_from([0.0, 0.2, 5.0]))
def test_omnidrop_drops_what_its_algorithm_drops(seed, drop, diversity):
    view = view_of(LAYOUTS, seed=seed)
    scores = METHODS["omnidrop"](drop=drop, diversity=diversity).score(view)
    for row, real in rows(view):
        media = [i for i in real if view.modality[row, i] > 0]
        attention = {i: float(view[Signal.TEXT_QUERIES][row, i]) for i in media}
        k = floor(drop * len(media) + 1e-6)
        if not k:
            continue
        chunk = {i: floor(view.second[row, i] / 2) if not isnan(view.second[row, i]) else None for i in media}
        far = {}
        for item in {int(view.item[row, i]) for i in media}:
            mine = [i for i in media if view.item[row, i] == item]
            last = max(1, *(c for c in [*(chunk[i] for i in mine), 0] if c is not None))
            key = chunk[max(mine, key=attention.__getitem__)]
            far |= {i: 0 if None in (key, chunk[i]) else abs(chunk[i] - key) / last for i in mine}
        candidates = sorted(media, key=attention.__getitem__)[: 2 * k]
        gone = sorted(candidates, key=lambda i: attention[i] + diversity * far[i])[:k]
        assert set(sorted(media, key=lambda i: float(scores[row, i]))[:k]) == set(gone)


def test_omnidrop_spares_what_is_far_in_time():
    attention = torch.tensor([[0.0] * 1 + [0.9, *[0.0] * 19] + [0.001] * 9 + [0.0] * 3])
    view = view_of([APART], attention=attention)
    near, far = METHODS["omnidrop"](drop=0.5).score(view)[0, [2, 21]]
    assert far > near
    assert METHODS["omnidrop"](drop=0.5, diversity=0).score(view)[0, 21] > near


# windows of two seconds, two frames each; the second is silent, and some sound has no time
TALK = layout(
    (TEXT, 2, -1, nan),
    *(run for f in range(4) for run in ((VIDEO, 7, 2 * f, f), (AUDIO, 4 * (f not in (2, 3)), 2 * f, f))),
    (VIDEO, 7, 8, 4.0),
    (AUDIO, 6, 8, 4.5),
    (AUDIO, 5, -1, nan),
    (TEXT, 3, -1, nan),
)
# the same without seconds: four sampled frames a window
UNTIMED = Layout.join(
    Layout.of(m, n, frame=np.full(n, f))
    for m, n, f in (
        (VIDEO, 4, 0),
        (VIDEO, 4, 2),
        (AUDIO, 9, 2),
        (VIDEO, 4, 4),
        (VIDEO, 4, 6),
        (AUDIO, 9, 6),
        (TEXT, 2, -1),
    )
)


class LiteralOmnizip:
    """OmniZip of one row, token by token."""

    def __init__(self, view, row, real, *, audio=0.75, anchors=0.05, merged=3, window=2.0):
        self.view, self.row, self.merged = view, row, merged
        kind = {i: int(view.modality[row, i]) for i in real}
        self.audio, self.video = ([i for i in real if kind[i] == m] for m in (AUDIO, VIDEO))
        attention = {i: float(view[Signal.AUDIO_ENCODER][row, i]) for i in real}
        total = ceil(audio * len(self.audio) - 1e-6)
        number = min(total, floor(anchors * len(self.audio) + 0.5))
        ranked = sorted(self.audio, key=lambda i: (-attention[i], i))
        self.dominant, rest = ranked[: total - number], sorted(ranked[total - number :])
        self.anchors = [rest[k * len(rest) // number] for k in range(number)]
        others = [i for i in ranked if i in rest and i not in self.anchors]
        self.audio_order = [*self.dominant, *self.anchors, *others]
        item = {i: int(view.item[row, i]) for i in real}
        timed = {item[i] for i in real if not isnan(view.second[row, i])}
        self.window = {i: self.window_of(i, item[i], item[i] in timed, window) for i in real}
        self.frame = {i: (item[i], int(view.frame[row, i])) for i in real}

    def window_of(self, i, item, timed, window):
        second, frame = float(self.view.second[self.row, i]), int(self.view.frame[self.row, i])
        if timed:
            return None if isnan(second) else (item, floor(second / window))
        return None if frame < 0 else (item, floor(frame / (2 * window)))

    def shares(self):
        share = {}
        for w in {self.window[i] for i in self.video} - {None}:
            heard = [i for i in self.audio if self.window[i] == w]
            if heard:
                share[w] = 0.75 - 0.4 * sum(i in self.dominant for i in heard) / len(heard)
        guided = [share[self.window[i]] for i in self.video if self.window[i] in share]
        mean = sum(guided) / len(guided) if guided else 0.75
        return {i: round(share.get(self.window[i], mean), 6) for i in self.video}

    def worth(self, i):
        frame = self.frame
        earlier_frames = {frame[j] for j in self.video if self.window[j] == self.window[i] and frame[j] < frame[i]}
        if len(earlier_frames) % 2 == 1:
            previous, _ = before(self.view, self.row, i, 1)
            return 1.0 if previous is None else -cosine(self.hidden(i), self.hidden(previous))
        mates = [j for j in self.video if frame[j] == frame[i]]
        distance = {(a, b): 1 - cosine(self.hidden(a), self.hidden(b)) for a in mates for b in mates if a != b}
        density = {}
        for a in mates:
            near = sorted(distance[a, b] for b in mates if b != a)[:5]
            density[a] = exp(-sum(near) / max(1, len(near)))
        denser = [distance[i, j] for j in mates if density[j] > density[i]]
        return density[i] * (min(denser) if denser else max((distance[i, j] for j in mates if j != i), default=0))

    def hidden(self, i):
        return self.view.hidden[self.row, i]

    def video_order(self):
        worth, shares, key = {i: self.worth(i) for i in self.video}, self.shares(), {}
        for i in self.video:
            mates = [j for j in self.video if self.frame[j] == self.frame[i]]
            below = sum((worth[j], -j) < (worth[i], -i) for j in mates)
            key[i] = (below + 0.5) / len(mates) / shares[i]
        return sorted(self.video, key=lambda i: (-key[i], i))

    def merge(self, kept):
        """What each kept anchor becomes."""
        anchors = [a for a in self.anchors if a in kept]
        belongs, likeness = {a: [] for a in anchors}, {}
        for i in self.audio:
            if i in kept or not anchors:
                continue
            nearest = max(anchors, key=lambda a: (cosine(self.hidden(i), self.hidden(a)), -a))
            shown = [j for j in self.video if self.window[j] == self.window[i] is not None]
            compared = shown or [nearest]
            likeness[i] = max(cosine(self.hidden(i), self.hidden(j)) for j in compared)
            belongs[nearest].append(i)
        found = {}
        for a, mine in belongs.items():
            taken = sorted(mine, key=lambda i: (-likeness[i], i))[: self.merged]
            if taken:
                weights = [exp(likeness[i]) for i in taken]
                mean = sum(w * self.hidden(i).double() for w, i in zip(weights, taken, strict=True)) / sum(weights)
                found[a] = (self.hidden(a).double() + mean) / 2
        return found


OMNIZIP = [{}, {"audio": 0.6, "anchors": 0.3, "merged": 2}, {"audio": 0.5, "anchors": 0.5, "window": 1.0}]


@pytest.mark.parametrize("options", OMNIZIP)
@pytest.mark.parametrize("seed", range(3))
def test_omnizip_is_its_definition(options, seed):
    view = view_of([TALK, UNTIMED, *LAYOUTS], seed=seed)
    scores = METHODS["omnizip"](**options).score(view)
    for row, real in rows(view):
        literal = LiteralOmnizip(view, row, real, **options)
        for order in (literal.audio_order, literal.video_order()):
            expected = [-place / len(order) for place in range(len(order))]
            assert scores[row, order].tolist() == pytest.approx(expected)
        assert all(scores[row, i] == 1 for i in real if view.modality[row, i] == TEXT)


@pytest.mark.parametrize("options", OMNIZIP)
@pytest.mark.parametrize("share", [None, 0.3, 0.9])
def test_omnizips_anchors_take_in_what_is_like_the_video(options, share):
    view, method = view_of([TALK, UNTIMED, *LAYOUTS], seed=4), METHODS["omnizip"](**options)
    share = share or options.get("audio", 0.75)
    audio = (view.modality == AUDIO).sum(1)
    pools = [(frozenset({AUDIO}), (audio * share).ceil().long()), (frozenset({VIDEO}), audio // 2)]
    chosen, real = select(method.score(view), view.modality, pools, view.slots.shape[1])
    merged, seen = method.merge(view, chosen, real), 0
    for row, tokens in rows(view):
        kept = chosen[row, real[row]].tolist()
        found = LiteralOmnizip(view, row, tokens, **options).merge(kept)
        expected = torch.stack([found.get(i, view.hidden[row, i].double()) for i in kept])
        assert (merged[row, real[row]] - expected).abs().max() < 1e-5
        seen += len(found)
    assert seen > 0 or share == 0.3, "a plan that keeps less than the method is told has no place for anchors"


def test_omnizip_drops_video_of_windows_as_their_audio_says():
    """Eight windows of two frames, the encoder attending to the last ones more and more."""
    many = layout(
        *(run for w in range(8) for run in ((VIDEO, 50, 4 * w, 2.0 * w), (VIDEO, 50, 4 * w + 2, 2.0 * w + 1))),
        *((AUDIO, 20, -1, 2.0 * w) for w in range(8)),
        (TEXT, 1, -1, nan),
    )
    attention = torch.rand(1, len(many), generator=torch.Generator().manual_seed(0))
    attention[0, 800:-1] += torch.arange(8).repeat_interleave(20) / 4
    view = view_of([many], attention=attention)
    scores = METHODS["omnizip"]().score(view)
    literal = LiteralOmnizip(view, 0, list(range(len(many))))
    share = literal.shares()
    for count in (240, 320, 560):
        chosen, real = select(scores, view.modality, [(frozenset({VIDEO}), torch.tensor([count]))], 161 + count)
        assert real.all()
        kept = set(chosen[0].tolist())
        scale = (800 - count) / sum(share.values())
        for frame in range(16):
            gone = 50 - len(kept & set(range(50 * frame, 50 * frame + 50)))
            assert gone == pytest.approx(min(50, 50 * share[50 * frame] * scale), abs=2)
    assert share[0] > share[799] + 0.2


def test_window_pools_neighbours_within_the_row():
    view = view_of(LAYOUTS)
    for pool in (1, 5):
        scores = METHODS["window"](pool=pool).score(view)
        for row, real in rows(view):
            for i in real:
                near = [j for j in range(i - pool // 2, i + pool // 2 + 1) if j in real]
                expected = sum(float(view[Signal.WINDOW][row, j]) for j in near) / pool
                assert scores[row, i] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("pool", [2**31 + 1, 10**30 + 1])
def test_a_pool_larger_than_a_prompt_makes_all_tokens_alike(pool):
    view = view_of(LAYOUTS)
    scores = METHODS["window"](pool=pool).score(view)
    for row, real in rows(view):
        assert scores[row, list(real)] == pytest.approx(float(scores[row, next(iter(real))]), abs=1e-6)


@pytest.mark.parametrize("name", ["dycoke", "evs", "keep-first"])
def test_each_clip_of_a_prompt_is_scored_as_if_it_were_alone(name):
    view = view_of([TWO], seed=3)
    scores = METHODS[name]().score(view)[0]
    start = 0
    for one in (APART, MIXED):
        hidden = view.hidden[:, start : start + len(one)]
        media = torch.from_numpy(one.item >= 0)
        alone = METHODS[name]().score(view_of([one], hidden=hidden))[0]
        assert torch.equal(scores[start : start + len(one)][media], alone[media])
        start += len(one)


def test_position_shares_a_budget_among_clips_in_proportion():
    clips = [layout((VIDEO, n, -1, nan), (AUDIO, m, -1, nan)) for n, m in ((10, 5), (40, 10))]
    two = Layout.join([layout((TEXT, 2, -1, nan)), clips[0], second_item(clips[1]), layout((TEXT, 3, -1, nan))])
    view = view_of([two])
    scores = METHODS["position"]().score(view)[0]
    for modality, counts in ((VIDEO, (4, 16)), (AUDIO, (2, 4))):
        member = [i for i in range(len(two)) if two.modality[i] == modality]
        kept = sorted(member, key=lambda i: (-scores[i], i))[: sum(counts)]
        for item, count in enumerate(counts):
            first = [i for i in member if two.item[i] == item][:count]
            assert [i for i in sorted(kept) if two.item[i] == item] == first


@pytest.mark.parametrize("share", [2, 4, 8])
def test_strided_keeps_every_so_manieth_token(share):
    view = view_of([layout((TEXT, 1, -1, nan), (VIDEO, 64, -1, nan), (AUDIO, 32, -1, nan), (TEXT, 2, -1, nan))])
    scores = METHODS["strided"]().score(view)[0]
    for start, tokens in ((1, 64), (65, 32)):
        order = scores[start : start + tokens].argsort(descending=True, stable=True)
        assert sorted(order[: tokens // share].tolist()) == list(range(0, tokens, share))


@given(st.integers(1, 300), st.integers(1, 300))
def test_strided_leaves_no_wide_gap(tokens, kept):
    kept = min(tokens, kept)
    view = view_of([layout((VIDEO, tokens, -1, nan), (TEXT, 1, -1, nan))])
    scores = METHODS["strided"]().score(view)[0, :tokens]
    chosen = sorted(scores.argsort(descending=True, stable=True)[:kept].tolist())
    gaps = [b - a for a, b in zip(chosen, [*chosen[1:], tokens], strict=True)]
    assert chosen[0] == 0
    assert max(gaps) <= 4 * tokens / kept


@pytest.mark.parametrize("name", ["last-query", "rollout"])
def test_lowest_turns_a_score_round(name):
    view = view_of([APART])
    assert torch.equal(METHODS[name](lowest=True).score(view), -METHODS[name]().score(view))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_half_precision_gives_the_same_kind_of_score(name):
    view = view_of(LAYOUTS, hidden=torch.ones(len(LAYOUTS), len(TWO), 6, dtype=torch.bfloat16))
    scores = METHODS[name]().score(view)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("last-query", {"lowest": "no"}, r"lowest(?!.*needs)"),
        ("divprune", {"limit": 0}, "at least 1"),
        ("dart", {"pivots": 0}, "at least 1"),
        ("dart", {"texts": -1}, "at least 0"),
        ("omnidrop", {"drop": 2}, "from 0 to 1"),
        ("omnidrop", {"chunk": 0}, "chunk must be"),
        ("omnizip", {"audio": 2}, "from 0 to 1"),
        ("omnizip", {"anchors": -1}, "anchors must be"),
        ("omnizip", {"merged": -1}, "at least 0"),
        ("omnizip", {"window": 0}, "window must be"),
        ("window", {"pool": 4}, "odd"),
        ("window", {"pool": "x"}, "pool"),
    ],
)
def test_wrong_options_are_refused(method, options, message):
    step = Step(layers="1", method=method, options=options, keep=Keep(media=Share(0.5)))
    with pytest.raises(PlanError, match=message):
        method_of(step)
