"""What methods are shown is what the model's own attention says, alone and in a left-padded batch."""

import pytest
import torch

from fastav.budgets import Share
from fastav.engines.transformers import prune
from fastav.errors import PlanError, UnsupportedModel
from fastav.method import ATTENTION_SIGNALS, ENCODER_SIGNALS, OWN_SIGNALS, Method, Signal, View
from fastav.plan import Keep, Plan, Step
from fastav.pruning.compiled import compile_plan
from fastav.pruning.state import WINDOW
from support.cases import ROWS
from support.tiny import TinyAdapter, pad_left, tiny_model

SEEN: dict[int, View] = {}


class Watch(Method):
    """Keeps what it is shown, and scores by position; the encoders' attention has tests of its own."""

    needs = frozenset(Signal) - {Signal.GIVEN} - ENCODER_SIGNALS

    def score(self, view):
        SEEN[view.layer] = view
        return -view.position.float()


def views(monkeypatch, attention, rows):
    monkeypatch.setattr("fastav.pruning.compiled.method_of", lambda step: Watch())
    keep = Keep(media=Share(0.7))
    plan = Plan((Step(layers="3", method="position", keep=keep), Step(layers="5", method="position", keep=keep)))
    model = tiny_model(attention)
    SEEN.clear()
    with prune(model, plan, adapter=TinyAdapter()), torch.no_grad():
        model(**pad_left(rows))
    return model, dict(SEEN)


def maps(model, ids):
    """Attention maps of the unpruned model, mean over heads."""
    with torch.no_grad():
        return [a[0].mean(0) for a in model(ids, output_attentions=True, use_cache=False).attentions]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_signals_before_the_first_cut(monkeypatch, attention, rows):
    _, seen = views(monkeypatch, attention, rows)
    eager = tiny_model("eager")
    for row, ids in enumerate(rows):
        n, view = ids.shape[1], seen[3]
        attentions = maps(eager, ids)
        after = 1 + int((ids[0] >= 62).nonzero().max())
        rollout = torch.eye(n)
        for layer in attentions[:3]:
            rollout = (0.5 * layer + 0.5 * torch.eye(n)) @ rollout
        expected = {
            Signal.LAST_QUERY: attentions[2][-1],
            Signal.TEXT_QUERIES: attentions[2][after:].mean(0),
            Signal.WINDOW: attentions[2][-WINDOW:].mean(0),
            Signal.OWN_LAST_QUERY: attentions[3][-1],
            Signal.OWN_TEXT_QUERIES: attentions[3][after:].mean(0),
            Signal.ROLLOUT: rollout[-1],
        }
        for signal, value in expected.items():
            assert (view[signal][row, -n:] - value).abs().max() < 1e-5, signal
        assert view.hidden.shape[1] == view.slots.shape[1] == view.keys.shape[2]


def test_signals_after_a_cut_are_of_the_tokens_still_there(monkeypatch):
    _, seen = views(monkeypatch, "sdpa", ROWS)
    view = seen[5]
    for signal in ATTENTION_SIGNALS | OWN_SIGNALS:
        real = view.modality >= 0
        assert (view[signal].masked_fill(real, 0) == 0).all()
        assert view[signal].sum(1).tolist() == pytest.approx([1.0] * len(ROWS), abs=1e-5)
    assert (view[Signal.ROLLOUT].sum(1) < 1).all(), "what was dropped has its share of the rollout too"


def test_places_count_within_a_frame(monkeypatch):
    _, seen = views(monkeypatch, "sdpa", ROWS[:1])
    view = seen[3]
    video = view.modality[0] == 2
    assert view.frame[0, video].tolist() == [i // 4 for i in range(16)]
    assert view.place[0, video].tolist() == [i % 4 for i in range(16)]
    assert view.question[0].tolist() == [i >= 31 for i in range(ROWS[0].shape[1])]


def test_scores_of_another_shape_are_refused(monkeypatch):
    class Short(Method):
        def score(self, view):
            return view.position[:, :3].float()

    monkeypatch.setattr("fastav.pruning.compiled.method_of", lambda step: Short())
    plan, model = Plan((Step(layers="3", method="position", keep=Keep(media=Share(0.7))),)), tiny_model()
    pruned = prune(model, plan, adapter=TinyAdapter())
    with torch.no_grad(), pruned, pytest.raises(PlanError, match="method 'position' returned scores"):
        model(**pad_left(ROWS))


def test_a_plan_compiled_for_another_model_is_refused():
    model, plan = tiny_model(), Plan((Step(layers="3", method="position", keep=Keep(media=Share(0.7))),))
    own = compile_plan(plan, model.model.config, TinyAdapter())
    with torch.no_grad(), prune(model, own) as pruning:
        model(**pad_left(ROWS))
    assert len(pruning.slots()) == 2
    with pytest.raises(PlanError, match="compiled for another model"):
        prune(tiny_model(), own)


def test_a_decoder_of_another_depth_than_its_configuration_is_refused():
    model, plan = tiny_model(), Plan((Step(layers="3", method="position", keep=Keep(media=Share(0.7))),))
    del model.model.layers[-1]
    with pytest.raises(UnsupportedModel, match="has 5 layers, its configuration says 6"):
        prune(model, plan, adapter=TinyAdapter())
