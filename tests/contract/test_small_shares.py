"""At small shares every recipe keeps something of the beginning, of the middle and of the end of a clip."""

import inspect

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from fastav.layout import Layout, Modality
from fastav.method import Signal, View, method_of
from fastav.methods._order import earlier, ranks, rows_at, temporal_ranks
from fastav.plan import Plan
from fastav.pruning.device_layout import batch_layout, cut_counts
from fastav.pruning.selection import SelectionGroups, select
from fastav.recipes import recipe
from fastav.registry import RECIPES
from fastav.target import Target

DEPTH = 28
FRAMES, PLACES, SOUND = 30, 16, 240
EXEMPT = {
    "keep-first": "the beginning is what it keeps",
    "trim": "it has no share",
    "vtw": "it keeps nothing",
    "omnizip": "its share of audio is its own; see test_omnizip_keeps_of_every_part",
    "seats": "its budgets follow from a retention; see test_seats_keeps_of_every_part",
    "omnidrop": "its shares are of two kinds; see test_omnidrop_keeps_of_every_part",
}


def clip(frames=FRAMES, sound=SOUND, *, known=True):
    """Text, video, sound, text, as VideoLLaMA2 has it.  known: whether frames are."""
    video = frames * PLACES
    parts = [
        Layout.of(Modality.TEXT, 3),
        Layout.of(Modality.VIDEO, video, frame=np.arange(video) // PLACES if known else None),
        Layout.of(Modality.AUDIO, sound),
        Layout.of(Modality.TEXT, 5),
    ]
    return Layout.join(parts)


def kept(plan, layout, score=None):
    """The tokens that stay at each cut, where hidden states, keys and attention are random.  [tokens] each."""
    make = torch.Generator().manual_seed(0)
    columns = batch_layout([layout], len(layout), torch.device("cpu"))
    slots, cuts = torch.arange(len(layout))[None], [*plan.cuts(DEPTH), *plan.cache_cuts(DEPTH)]
    hidden, chosen = torch.randn(1, len(layout), 32, generator=make), []
    counts = cut_counts(plan, [layout], DEPTH, torch.device("cpu"))
    for (layer, step), (pools, limits, _, width, _) in zip(cuts, counts, strict=True):
        there = slots if not step.cache_only else torch.arange(len(layout))[None]
        keys = torch.randn(1, 2, there.shape[1], 8, generator=make)  # first: the number of signals changes no choice
        signals = {signal: torch.rand(there.shape, generator=make) for signal in Signal if signal != Signal.QUESTION}
        signals[Signal.HIDDEN_STATES] = hidden.gather(1, there[..., None].expand(-1, -1, 32))
        signals[Signal.KEYS] = keys
        view = View(
            layer=layer,
            layout=columns,
            slots=there,
            pool=SelectionGroups.of(columns.modality, pools).group,
            signals=signals,
            method="-",
            needs=frozenset(Signal),
        )
        limited = list(zip(pools, limits.T, strict=False))
        index, _ = select((score or method_of(step).score)(view), view.modality, limited, width)
        slots = there.gather(1, index)
        chosen.append(slots[0].numpy())
    return chosen


def parts(layout, tokens, modality):
    """How many of these tokens are of each third of the modality's own."""
    own = np.flatnonzero(layout.modality == modality)
    third = np.searchsorted(own, tokens[layout.modality[tokens] == modality]) * 3 // len(own)
    return np.bincount(third, minlength=3)


def require_parts(plan, layout, enough=None):
    """Every cut that leaves `enough` tokens of a modality leaves some of each third of them.

    Where chance decides, 12 tokens miss a third in 2 of 100 cuts, 30 in 2 of 100,000.
    """
    cuts = kept(plan, layout)
    enough = enough or (12 if len(cuts) == 1 else 30)
    assert cuts
    for tokens in cuts:
        for modality in (Modality.VIDEO, Modality.AUDIO):
            left = parts(layout, tokens, modality)
            assert left.sum() < enough or left.min() > 0, (modality.label, left)


@pytest.mark.parametrize("share", [0.03, 0.05, 0.1, 0.2, 0.24])
@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(EXEMPT)))
def test_a_recipe_keeps_of_every_part_of_a_clip(name, share):
    assert "keep" in inspect.signature(RECIPES[name]).parameters
    # of EVS the first frame always stays, 16 tokens; what else stays must be spread
    require_parts(recipe(f"{name}@{share}"), clip(), enough=PLACES + 12 if name == "evs" else None)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_omnidrop_keeps_of_every_part(share):
    require_parts(RECIPES["omnidrop"](audio=share, video=share), clip(), enough=20)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.35])
def test_seats_keeps_of_every_part(share):
    whole = recipe(f"seats@r={share}")
    first = Plan(whole.steps[:1], target=Target(retention=min(1.0, 1.4 * share)))
    require_parts(first, clip(), enough=12)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_omnizip_keeps_of_every_part(share):
    require_parts(RECIPES["omnizip"](audio=share, video=share, anchors=0.02), clip())


@pytest.mark.parametrize("name", ["dycoke", "evs", "omnizip"])
def test_video_whose_frames_are_unknown_keeps_of_every_part(name):
    plan = RECIPES["omnizip"](audio=0.2, video=0.2) if name == "omnizip" else recipe(f"{name}@0.2")
    require_parts(plan, clip(known=False))


# --- what DyCoke keeps below a quarter


def of_whole_frames(view):
    """DyCoke's scores as the paper's ratios need them: one for all that stays whole, of known frames."""
    in_time = temporal_ranks(view)
    number, hidden = in_time.rank % 4, view.hidden
    other = earlier(in_time.order, torch.where(number == 2, 2, 1))
    similarity = cosine_similarity(hidden, rows_at(hidden, other), dim=-1)
    frame = torch.where(view.modality == Modality.AUDIO, 0, view.frame + 1)
    ranked = ranks(-similarity, torch.where(number == 0, -1, ((view.modality + 1) << 21) | frame))
    return torch.where(number == 0, 1.0, -ranked.rank / ranked.size)


@pytest.mark.parametrize(("frames", "sound"), [(8, 1496), (16, 240), (32, 480)])
@pytest.mark.parametrize("share", [0.25, 0.475, 0.5, 0.75])
def test_from_a_quarter_on_the_choice_is_the_papers(frames, sound, share):
    plan, layout = recipe(f"dycoke@{share}"), clip(frames, sound)
    assert np.array_equal(*kept(plan, layout), *kept(plan, layout, score=of_whole_frames))


def test_below_a_quarter_whole_frames_lose_alike_and_sound_is_spread():
    layout = clip(32, 128)
    (tokens,) = kept(recipe("dycoke@0.125"), layout)
    video = tokens[layout.modality[tokens] == Modality.VIDEO]
    assert np.array_equal(np.bincount(layout.frame[video], minlength=32), [8, 0, 0, 0] * 8)
    sound = np.flatnonzero(layout.modality == Modality.AUDIO)
    assert np.array_equal(tokens[layout.modality[tokens] == Modality.AUDIO], sound[::8])
