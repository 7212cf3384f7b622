"""Records of cuts: what was cut, in a padded batch too, and nothing unless someone records."""

import threading

import pytest
import torch

from fastav.budgets import Share
from fastav.engine import Engine
from fastav.engines.transformers import prune
from fastav.engines.vllm.engine import VllmEngine
from fastav.errors import UnsupportedPlan
from fastav.plan import Keep, Plan, Step
from fastav.pruning.state import PruningState
from support.cases import PLAN, ROWS
from support.tiny import AUDIO_ID, VIDEO_ID, TinyAdapter, pad_left, tiny_model
from support.toy import scene_request


def recorded(plan=PLAN, rows=ROWS):
    model, made = tiny_model(), []
    inputs = pad_left(rows)
    with prune(model, plan, adapter=TinyAdapter()) as pruning, torch.no_grad():
        with pruning.record_cuts(made.append):
            model(**inputs)
        count = len(made)
        model(**inputs)
    assert len(made) == count  # the context has ended
    return inputs, pruning, made


def test_candidates_are_the_media_that_remain_and_padding_is_none():
    inputs, pruning, made = recorded()
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, 1))
    before = [slots for _, slots in pruning.slots()[:-1]]
    assert [record.layer for record in made] == [layer for layer, _ in pruning.slots()[1:]]
    for record, slots in zip(made, before, strict=True):
        assert torch.equal(record.slots, slots)
        tokens = ids.gather(1, slots)
        assert torch.equal(record.is_candidate, (tokens == AUDIO_ID) | (tokens == VIDEO_ID))


def test_kept_tokens_are_the_next_slots():
    inputs, pruning, made = recorded()
    length = inputs["input_ids"].shape[1]
    for record, (_, after) in zip(made, pruning.slots()[1:], strict=True):
        for row in range(len(ROWS)):
            kept = record.slots[row][record.is_kept[row]].tolist()
            assert kept == [slot for slot in after[row].tolist() if slot < length]


def test_cuts_in_caches_are_recorded():
    keep = Keep(media=Share(0.5))
    plan = Plan((Step(layers="1..2", method="random", keep=keep, cache_only=True),))
    _, pruning, made = recorded(plan)
    assert [(record.layer, record.is_cache_only, record.method) for record in made] == [
        (layer, True, "random") for layer in (1, 2)
    ]
    assert len(pruning.slots()) == 1
    assert all((record.is_kept.sum(1) < record.slots.shape[1]).all() for record in made)


def test_nothing_is_recorded_by_default(monkeypatch):
    started = []
    start = PruningState.start.__func__
    monkeypatch.setattr(
        PruningState, "start", classmethod(lambda cls, *a, **k: started.append(start(cls, *a, **k)) or started[-1])
    )
    model = tiny_model()
    with prune(model, PLAN, adapter=TinyAdapter()), torch.no_grad():
        model(**pad_left(ROWS))
    assert [state.on_cut for state in started] == [None]


def fails_after(run):
    run()
    raise TypeError("missing 1")


def test_the_inner_of_two_recorders_records_and_other_threads_do_not():
    model, outer, inner = tiny_model(), [], []
    inputs = pad_left(ROWS)
    with prune(model, PLAN, adapter=TinyAdapter()) as pruning, torch.no_grad():
        with pruning.record_cuts(outer.append):
            with pytest.raises(TypeError, match="missing 1"), pruning.record_cuts(inner.append):
                fails_after(lambda: model(**inputs))
            assert inner
            assert not outer
            other = threading.Thread(target=torch.no_grad()(lambda: model(**inputs)))
            other.start()
            other.join()
            assert not outer
            model(**inputs)
        assert len(outer) == len(inner)


def test_the_engine_vllm_refuses_to_inspect():
    assert VllmEngine.inspect is Engine.inspect
    with pytest.raises(UnsupportedPlan, match="VllmEngine does not expose its cuts"):
        VllmEngine.__new__(VllmEngine).inspect(scene_request(), PLAN)
