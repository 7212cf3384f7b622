"""What of the vLLM plugin needs no vLLM: reading the plan, refusing, and where tokens are."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.engines.vllm.guards import BY_LAYOUT, Serving, check, read
from fastav.engines.vllm.guards import MODELS as SERVED
from fastav.engines.vllm.parts import MOST, parts
from fastav.engines.vllm.passage import Passages
from fastav.engines.vllm.walk import Row, Walk, geometry
from fastav.errors import PlanError, UnknownName, UnsupportedModel, UnsupportedPlan
from fastav.method import Method, Signal
from fastav.plan import Keep, Plan, Share, Step, Tokens
from fastav.registry import METHODS, MODELS

OMNI = MODELS["qwen2-5-omni"]()
CONFIG = OMNI.config()
LAYERS = CONFIG.get_text_config(decoder=True).num_hidden_layers
GLOBAL = Plan((Step(layers="middle", method="position", keep=Keep(video=Tokens(5), audio=Tokens(2))),))
IDS = [1, 2] + [CONFIG.video_token_id] * 12 + [CONFIG.audio_token_id] * 8 + [3, 4, 5]


def asked(plan, config=CONFIG):
    said = plan if isinstance(plan, str) else json.loads(plan.to_json())
    found = read({"fastav": {"plan": said}}, config)
    assert found is not None
    return found


def prompt(ids=IDS):
    return {"input_ids": np.array([ids]), "video_grid_thw": np.array([[3, 4, 4]])}


def test_without_a_word_of_fastav_nothing_is_asked():
    assert read({}, CONFIG) is None
    assert read(None, CONFIG) is None
    assert read({"other": 1}, CONFIG) is None


@pytest.mark.parametrize("name", ["FastAV", "fast-av", "FASTAV", "fast_av"])
def test_a_name_that_means_fastav_is_not_passed_over(name):
    with pytest.raises(PlanError, match=f"names {name}, of which nothing is read"):
        read({name: {"plan": "fastav"}}, CONFIG)


@pytest.mark.parametrize("said", [None, 1, {}, {"plan": 3}, {"plan": "fastav", "more": 1}, ["plan"]])
def test_what_makes_no_sense_is_refused(said):
    with pytest.raises(PlanError):
        read({"fastav": said}, CONFIG)


def test_plans_are_named_or_written_out():
    assert asked("fastav").plan == OMNI.preset("fastav")
    assert asked("fastv@0.25").plan.name
    assert asked(GLOBAL).plan == GLOBAL
    with pytest.raises(UnknownName, match="did you mean"):
        asked("fastaw")


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(SERVED)))
def test_other_models_are_refused(name):
    with pytest.raises(UnsupportedModel, match="cannot be pruned inside vLLM yet"):
        check(asked("fastav", MODELS[name]().config()), Serving())


@pytest.mark.parametrize("name", ["fastav", "fastav-plus", "fastav-trim", "fastv", "pyramiddrop", "none"])
def test_presets_and_recipes_are_served(name):
    check(asked(name), Serving())


def test_plans_that_ask_for_more_are_refused():
    keep = Keep(media=Share(0.5))
    with pytest.raises(UnsupportedPlan, match="of one layer alone"):
        check(asked(Plan((Step(layers="5", method="position", keep=keep, cache_only=True),))), Serving())
    with pytest.raises(UnsupportedPlan, match="given scores"):
        check(asked(Plan((Step(layers="5", method="given", keep=keep),))), Serving())
    with pytest.raises(UnsupportedPlan, match="encoder scores"):
        check(asked("omnizip"), Serving())
    with pytest.raises(UnsupportedPlan, match="when tokens are shown"):
        check(asked("omnidrop"), Serving())


@pytest.mark.parametrize("name", [name for name in Serving.__dataclass_fields__ if name != "chunked_prefill"])
def test_ways_of_serving_are_refused(name):
    with pytest.raises(UnsupportedPlan) as error:
        check(asked(GLOBAL), replace(Serving(), **{name: True if getattr(Serving(), name) is False else 2}))
    assert error.value.hint


def test_pieces_of_prompts_are_refused_where_scores_decide():
    check(asked(GLOBAL), Serving(chunked_prefill=True))
    with pytest.raises(UnsupportedPlan, match="LastQuery looks at whole prompts"):
        check(asked("fastav"), Serving(chunked_prefill=True))


def test_methods_by_layout_need_no_signal():
    for method in BY_LAYOUT:
        assert not method.needs
        assert method.merge is Method.merge
        assert method in METHODS.values()
    assert Signal.LAST_QUERY in METHODS["last-query"].needs


def test_a_layout_says_what_stays_in_every_piece():
    passage = Passages(asked(GLOBAL)).of(prompt(), torch.device("cpu"))
    half = LAYERS // 2
    assert passage.held == (len(IDS),) * half + (12,) * (LAYERS - half)
    stays = passage.stays[half]
    assert np.flatnonzero(~stays).tolist() == [*range(7, 14), *range(16, 22)]
    for computed in range(len(IDS) + 4):
        late = int(stays[:computed].sum()) + max(0, computed - len(IDS))
        assert passage.before(half, computed) == late
        assert passage.before(0, computed) == computed


def test_where_scores_decide_only_how_many_stay_is_known():
    passage = Passages(asked("fastav")).of(prompt(), torch.device("cpu"))
    assert passage.stays is None
    assert passage.before(LAYERS - 1, len(IDS) + 3) == passage.held[-1] + 3
    with pytest.raises(UnsupportedPlan, match="came alone"):
        Row(passage, 0, 4)
    text = Passages(asked("fastav")).of({"input_ids": np.array([[1, 2, 3]])}, torch.device("cpu"))
    assert text.whole
    assert Row(text, 1, 2).before(LAYERS - 1) == 1


def test_a_walk_leaves_what_stays_of_each_request():
    made = Passages(asked(GLOBAL))
    half, hidden = LAYERS // 2, torch.arange(40.0)[:, None]
    first = Row(made.of(prompt(), torch.device("cpu")), 0, 9)  # a piece of a prompt
    text = Row(made.of({"input_ids": np.array([[1, 2, 3]])}, torch.device("cpu")), 0, 3)
    later = Row(made.of(prompt(), torch.device("cpu")), len(IDS) + 6, 1)  # an answer's token
    walk = Walk([first, text, later], torch.device("cpu"))
    assert (walk.tokens, walk.cut_here, walk.whole) == (13, True, False)
    left = walk.cut(half, hidden[:13])
    assert left.flatten().tolist() == [*range(7), 9, 10, 11, 12]
    assert walk.places().tolist() == left.flatten().int().tolist()
    where = walk.enter(half)
    assert where.lengths.tolist() == [7, 3, 12 + 7]
    assert where.starts.tolist() == [0, 7, 10, 11]
    assert where.place.tolist() == [*range(7), 0, 1, 2, 18]


def test_requests_without_tokens_are_left_out_of_a_layer():
    where = geometry([0, 2, 0, 1], [5, 7, 0, 0])
    assert where.requests.tolist() == [1, 3]
    assert where.row.tolist() == [0, 0, 1]
    assert where.place.tolist() == [7, 8, 0]
    assert where.lengths.tolist() == [9, 1]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=48))
def test_parts_hold_every_layer_in_the_fewest_slots(drops):
    held = np.cumsum(drops)[::-1].tolist()
    firsts = parts(held)
    size = len(held) // len(firsts)
    assert firsts == tuple(range(0, len(held), size))
    assert len(firsts) <= MOST
    slots = sum(held[first] for first in firsts) * size
    assert sum(held) <= slots <= held[0] * len(held)


def test_a_plan_that_cuts_once_at_the_middle_takes_two_parts_and_fastav_four():
    assert parts([100] * 28) == (0,)
    assert parts([100] * 14 + [40] * 14) == (0, 14)
    assert parts([100] * 14 + [int(40 * 0.8**n) for n in range(14)]) == (0, 7, 14, 21)
