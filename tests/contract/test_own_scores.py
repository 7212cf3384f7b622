"""Scores by the attention of the layer about to run, against maps of the model's own eager code, in every family."""

import pytest
import torch

from contract.test_traces import maps, otherwise_rounded
from fastav.budgets import Share
from fastav.engines.transformers import prune
from fastav.plan import Keep, Plan, Step
from fastav.pruning.device_layout import question_mask
from support.family import NAMES, family_of
from support.masked import masked_logits
from support.oracle import OwnRule

TOKEN = torch.zeros(1, dtype=torch.long)


def recorded(family, plan, attention="sdpa"):
    """The cuts of the first clip's prefill."""
    prepared, cuts, model = family.prepare(family.clips[0]), [], family.model(attention)
    pruned = prune(model, plan, layouts=prepared.layouts, adapter=family.adapter)
    with torch.no_grad(), pruned, pruned.record_cuts(cuts.append):
        model(**prepared.inputs, logits_to_keep=1)
    return cuts


def assert_close(scores, expected, error):
    """error: what rounding as on another CPU changes."""
    assert error.max() < 1e-3  # a criterion that everything meets would be none
    assert (scores.double() - expected).abs().max() <= 2e-6 + 8 * error.max()


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_layers_own_map(name, attention):
    """The first cut of a plan sees the unpruned model, whose map of that layer has the scores."""
    family = family_of(name)
    prepared, model = family.prepare(family.clips[0]), family.model()
    layers, question = family.adapter.decoder(model).layers, torch.from_numpy(question_mask(prepared.layouts[0]))
    dense = rows_of(maps(model, layers, prepared.inputs), question)
    with otherwise_rounded(layers):
        others = rows_of(maps(model, layers, prepared.inputs), question)
    for layer in {family.full_layers[0], family.full_layers[-1]}:
        for method, expected in dense.items():
            plan = Plan((Step(layers=str(layer), method=method, keep=Keep(media=Share(0.5))),))
            (cut,) = recorded(family, plan, attention)
            assert (cut.layer, cut.method) == (layer, method)
            assert_close(cut.scores[0], expected[layer], (expected - others[method])[: layer + 1].abs())


def rows_of(maps, question):
    """Scores [layers, tokens] of each method, from the maps of all layers."""
    return {
        "own-last-query": torch.stack([attention[-1] for attention in maps]),
        "own-text-queries": torch.stack([attention[question].mean(0) for attention in maps]),
    }


@pytest.mark.parametrize("name", NAMES)
def test_after_a_cut_scores_are_those_of_the_masked_model(name):
    """The second cut sees what the first has left, which the model's own code hides by a mask."""
    family = family_of(name)
    first, second = recorded(family, family.own)
    model, prepared = family.model(), family.prepare(family.clips[0])
    layers, found = family.adapter.decoder(model).layers, []

    def hide(cut):
        return torch.ones(len(prepared.layouts[0]), dtype=torch.bool).scatter(0, cut.slots[0][cut.is_kept[0]], False)

    def rule(score, hidden):
        found.append(score.double())
        return hide(second)

    rules = {first.layer: lambda score, hidden: hide(first), second.layer: OwnRule(rule)}
    masked_logits(model, layers, prepared.inputs, TOKEN, rules)
    with otherwise_rounded(layers):
        masked_logits(model, layers, prepared.inputs, TOKEN, rules)
    expected, other = (score[second.slots[0]] for score in found)
    assert second.slots.shape[1] < first.slots.shape[1]
    assert_close(second.scores[0], expected, (expected - other).abs())
