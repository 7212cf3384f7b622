"""Inspections of every family: the cuts are those of an answer's own prefill."""

import numpy as np
import pytest

from fastav.budgets import Share
from fastav.engines.transformers import TransformersEngine, prune
from fastav.errors import UnsupportedPlan
from fastav.layout import MEDIA
from fastav.plan import Keep, Plan, Step
from fastav.presets import NONE
from fastav.pruning.compiled import compile_plan
from support.family import NAMES, Family, family_of


def cut_in_cache(layer: int) -> Plan:
    return Plan((Step(layers=str(layer), method="random", keep=Keep(media=Share(0.5)), cache_only=True),))


def can_cut_cache(family: Family, layer: int) -> bool:
    config = family.adapter.decoder(family.model()).config
    try:
        compile_plan(cut_in_cache(layer), config, family.adapter)
    except UnsupportedPlan:
        return False
    return True


@pytest.fixture(params=NAMES, scope="module")
def family(request):
    return family_of(request.param)


@pytest.fixture
def engine(family):
    return TransformersEngine(family.model(), family.processor, family.adapter)


def test_kept_tokens_are_those_of_an_answer(family, engine):
    request, plan = family.clips[0], family.plan
    inspection = engine.inspect(request, plan)
    prepared = family.prepare(request)
    with prune(family.model(), plan, layouts=prepared.layouts, adapter=family.adapter) as pruning:
        family.model().generate(**prepared.inputs, max_new_tokens=3, do_sample=False)
    made = [cut for cut in inspection.cuts if not cut.is_cache_only]
    history = pruning.slots()[1:]
    assert len(made) == len(history) > 0
    alive = np.arange(len(inspection.layout))
    for cut, (layer, slots) in zip(made, history, strict=True):
        assert cut.layer == layer
        assert np.isin(cut.tokens, alive).all()
        assert set(alive) - set(cut.tokens) == {t for t in alive if inspection.layout.modality[t] not in MEDIA}
        alive = alive[~np.isin(alive, cut.tokens[~cut.kept])]
        assert alive.tolist() == slots[0].tolist()
        assert np.isfinite(cut.scores).all()
    (answer,) = engine.generate([request], plan, max_new_tokens=2, do_sample=False)
    assert len(answer.tokens_per_layer) == inspection.depth
    for layer, counts in enumerate(answer.tokens_per_layer):
        assert int((inspection.layers > layer).sum()) == sum(counts.values())
    assert (inspection.flops, inspection.kv_bytes) == (answer.flops, answer.kv_bytes)
    assert inspection.layout.by_modality() == answer.prompt_tokens


def test_highest_scores_stay(family, engine):
    for cut in engine.inspect(family.clips[0], family.plan).cuts:
        if 0 < cut.kept.sum() < len(cut.kept):
            assert cut.scores[cut.kept].min() >= cut.scores[~cut.kept].max()


def test_a_cut_in_a_cache_drops_no_token_of_later_layers(family, engine):
    layer = next(n for n in range(family.depth) if can_cut_cache(family, n))
    inspection = engine.inspect(family.clips[0], cut_in_cache(layer))
    (cut,) = inspection.cuts
    assert cut.is_cache_only
    assert cut.layer == layer
    assert 0 < cut.kept.sum() < len(cut.kept)
    assert (inspection.layers == inspection.depth).all()
    assert inspection.kv_bytes.pruned < inspection.kv_bytes.full


def test_a_plan_without_steps_has_no_cuts(family, engine):
    inspection = engine.inspect(family.clips[0], NONE)
    assert inspection.cuts == ()
    assert (inspection.layers == inspection.depth).all()
    assert inspection.flops.ratio == 1


def test_texts_of_text_tokens_join_to_the_prompt(family, engine):
    inspection = engine.inspect(family.clips[0], NONE)
    media = np.isin(inspection.layout.modality, MEDIA)
    assert [text is None for text in inspection.texts] == media.tolist()
    assert family.clips[0].question in "".join(text or "" for text in inspection.texts)
