"""What merges: the engine equals a model whose tokens are merged by hand, and in which what went is hidden."""

from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import pytest
import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from fastav.budgets import Share, Tokens
from fastav.engines.transformers import TransformersEngine, prune
from fastav.errors import UnsupportedPlan
from fastav.method import Method, Signal
from fastav.plan import Keep, Plan, Step
from fastav.recipes import recipe
from support import flash
from support.cases import ROWS, STEPS
from support.masked import masked_logits
from support.tiny import AUDIO_ID, VIDEO_ID, TinyAdapter, layout_of, pad_left, tiny_model

KEPT = 4  # of the audio
ATTENTION = ["sdpa", "eager", flash.NAME]


@dataclass(frozen=True, slots=True)
class Fold(Method):
    """The first tokens stay, and the last audio among them becomes the mean of itself and all that goes."""

    needs = frozenset({Signal.HIDDEN_STATES})

    def score(self, view):
        return -view.position.float()

    def merge(self, view, chosen, real):
        hidden = super(Fold, self).merge(view, chosen, real)
        kept = torch.zeros_like(view.slots).scatter_add(1, chosen, real.long()) > 0
        audio = view.modality == 1
        last = (audio & kept) & ((audio & kept).cumsum(1) == KEPT)
        part = ((view.modality > 0) & ~kept) | last
        mean = (view.hidden * part[..., None]).sum(1, keepdim=True) / part.sum(1)[:, None, None].clamp(min=1)
        return torch.where((last.gather(1, chosen) & real)[..., None], mean, hidden)


def plan_at(layer, **changes):
    keep = Keep(audio=Tokens(KEPT), video=Share(0.5))
    return Plan((Step(layers=str(layer), method="position", keep=keep, **changes),))


@contextmanager
def merged_by_hand(model, layer, groups):
    """Entering a layer, each first of these tokens becomes the mean of all named with it, in a prompt of one row."""

    def before(module, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        new = hidden.clone()
        for target, sources in groups.items():
            new[0, target] = hidden[0, sources].mean(0)
        return ((), {**kwargs, "hidden_states": new}) if "hidden_states" in kwargs else ((new, *args[1:]), kwargs)

    handle = model.model.layers[layer].register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def expected(ids, answer, layer, *, merge=True):
    """Logits of every step, and which tokens are hidden, from the ids alone."""
    audio = (ids[0] == AUDIO_ID).nonzero()[:, 0].tolist()
    video = (ids[0] == VIDEO_ID).nonzero()[:, 0].tolist()
    gone = [*audio[KEPT:], *video[ceil(len(video) / 2) :]]
    groups = {audio[KEPT - 1]: [audio[KEPT - 1], *gone]} if merge and len(audio) >= KEPT else {}
    hide = torch.zeros(ids.shape[1], dtype=torch.bool)
    hide[gone] = True
    model = tiny_model("eager")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with merged_by_hand(model, layer, groups):
        return masked_logits(model, model.model.layers, inputs, answer, {layer: lambda score, _: hide})


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_every_step_equals_a_model_merged_by_hand(monkeypatch, attention, layer, rows):
    monkeypatch.setattr("fastav.pruning.compiled.method_of", lambda step: Fold())
    model = tiny_model(attention)
    with prune(model, plan_at(layer), adapter=TinyAdapter()):
        out = model.generate(
            **pad_left(rows), max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    for row, ids in enumerate(rows):
        answer = out.sequences[row, -STEPS:]
        logits = torch.stack([step[row] for step in out.logits])
        assert (logits - expected(ids, answer, layer)).abs().max() < 1e-4
        different = layer > 0 or bool((ids == VIDEO_ID).any())  # before any layer all audio is alike here
        if different and int((ids == AUDIO_ID).sum()) >= KEPT:
            assert (logits - expected(ids, answer, layer, merge=False)).abs().max() > 1e-2, "nothing was merged"


def test_a_prompt_of_two_sounds_and_a_question_is_their_mean(monkeypatch):
    """Two audio tokens, one of which stays: the same as a prompt with one, whose embedding is the mean of both."""
    monkeypatch.setattr("fastav.pruning.compiled.method_of", lambda step: Fold())
    monkeypatch.setattr(f"{__name__}.KEPT", 1)
    model = tiny_model()
    embeds = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(5))
    layout = layout_of(torch.tensor([AUDIO_ID, AUDIO_ID, 7]))
    plan = Plan((Step(layers="0", method="position", keep=Keep(audio=Tokens(1))),))
    with torch.no_grad(), prune(model, plan, layouts=[layout], adapter=TinyAdapter()):
        found = model(inputs_embeds=embeds).logits[0, -1]
    mean = torch.cat([embeds[:, :2].mean(1, keepdim=True), embeds[:, 2:]], dim=1)
    with torch.no_grad():
        one = model(inputs_embeds=mean, position_ids=torch.tensor([[0, 2]])).logits[0, -1]
    assert (found - one).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["random", "evs", "pyramiddrop"])
def test_methods_that_only_drop_are_not_asked_to_merge(monkeypatch, name):
    def fail(*_):
        raise AssertionError("a plain method was asked to merge")

    model, plan = tiny_model(), recipe(name)
    monkeypatch.setattr(Method, "merge", fail)
    with torch.no_grad(), prune(model, plan, adapter=TinyAdapter()):
        assert model(ROWS[0]).logits[0, -1].isfinite().all()


def test_caches_alone_are_not_merged():
    plan = Plan((Step(layers="2", method="omnizip", keep=Keep(audio=Share(0.75)), cache_only=True),))
    with pytest.raises(UnsupportedPlan, match="method 'omnizip' merges hidden states, and a cut in a cache"):
        TransformersEngine.check(tiny_model().config, plan, adapter=TinyAdapter())
    with (
        pytest.raises(UnsupportedPlan, match="method 'omnizip' merges hidden states"),
        prune(tiny_model(), plan, adapter=TinyAdapter()),
    ):
        pass


def test_stacked_hidden_states_are_not_merged():
    config = Gemma3nTextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["full_attention"] * 4,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    )
    with pytest.raises(UnsupportedPlan, match="stacks several hidden states"):
        TransformersEngine.check(config, recipe("omnizip"), adapter=TinyAdapter())
    model, adapter = Gemma3nForCausalLM(config), TinyAdapter()
    with pytest.raises(UnsupportedPlan, match="stacks several"), prune(model, recipe("omnizip"), adapter=adapter):
        pass
