"""A pruned prefill never waits for the device, launches few kernels at a cut, and lets go of what is not read again."""

from typing import Any

import pytest
import torch

from fastav.budgets import Tokens
from fastav.cache_argument import of_output
from fastav.engines.transformers import prune
from fastav.layout import MEDIA, Modality
from fastav.plan import Keep, Plan, Step
from fastav.presets import fastav, plus, trim
from fastav.pruning.selection import select
from fastav.registry import METHODS, RECIPES
from fastav.target import Target
from support.launches import DEVICE, Alive, WouldWait, launches
from support.tiny import TinyAdapter, prompt, tiny_model

KEEP = Keep(audio=Tokens(4), video=Tokens(14))
BY_ROLLOUT = Plan((Step(layers="2", method="rollout", keep=KEEP), *fastav(KEEP).steps[1:]), "rollout")
PLANS = [fastav(KEEP), fastav(Keep(audio=Tokens(4)), drop=0, name="global"), trim(), plus(), BY_ROLLOUT]
# but for omnizip and the first stage of SEATS: the encoders that they ask wait for the device themselves
RECIPE_PLANS = [make() for name, make in RECIPES.items() if name not in ("omnizip", "seats")]
RECIPE_PLANS.append(Plan(RECIPES["seats"]().steps[1:], "seats inside", target=Target(retention=0.65)))
ROWS = [prompt(seed=1), prompt(before=5, video=20, audio=3, after=8, seed=2)]
# prompts of one length, since transformers looks at the padding of others, and waits
BATCHES = {"one": ROWS[:1], "even": [ROWS[0]] * 2, "ragged": ROWS}


def there(dtype=torch.float32, **changes) -> Any:
    """The tiny model, on the device."""
    with DEVICE:
        return torch.nn.Module.to(tiny_model(**changes), dtype)


def inputs_of(rows):
    """The prompts on the device, and their layouts."""
    ids = torch.cat(rows)
    return {"input_ids": ids.to(DEVICE)}, TinyAdapter().layouts(TinyAdapter().config(), {"input_ids": ids})


@torch.inference_mode()
def prefill(model, rows, plan=None):
    """What a prefill launches."""
    inputs, layouts = inputs_of(rows)
    if plan is None:
        return launches(lambda: model(**inputs, logits_to_keep=1))
    with prune(model, plan, layouts=layouts, adapter=TinyAdapter()):
        return launches(lambda: model(**inputs, logits_to_keep=1))


def beyond(rows, plan, layers, dtype=torch.float32):
    """How many kernels more than without pruning a decoder of so many layers launches."""
    model = there(num_hidden_layers=layers, dtype=dtype)
    return len(prefill(model, rows, plan)) - len(prefill(model, rows))


# --- the measure


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.cpu(),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x[torch.tensor([0, 1])],
    ],
)
def test_a_wait_is_noticed(wait):
    x = torch.ones(3, device=DEVICE)
    with torch.inference_mode(), pytest.raises(WouldWait):
        launches(lambda: wait(x))


@torch.inference_mode()
def test_views_launch_nothing_and_arithmetic_does():
    x = torch.ones(2, 3, device=DEVICE)
    assert launches(lambda: x[:, 1:].transpose(0, 1).expand(4, 2, 2).detach().unbind()) == []
    assert launches(lambda: torch.empty_like(x).reshape(3, 2)) == []
    assert launches(lambda: torch.ones(3) + 1) == []
    assert launches(lambda: (x * 2).sum()) == ["mul.Tensor", "sum"]
    assert launches(lambda: x.t().reshape(6)) == ["clone"]


# --- the engine


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("plan", [*PLANS, *RECIPE_PLANS], ids=lambda plan: plan.name)
def test_a_pruned_prefill_never_waits(plan, rows):
    assert prefill(there(), rows, plan)


@torch.inference_mode()
@pytest.mark.parametrize("pools", [[frozenset(MEDIA)], [frozenset({Modality.AUDIO}), frozenset({Modality.VIDEO})]])
def test_selecting_never_waits(pools):
    scores, modality = torch.zeros(2, 9, device=DEVICE), torch.ones(2, 9, dtype=torch.long, device=DEVICE)
    counts = [(pool, torch.ones(2, dtype=torch.long, device=DEVICE)) for pool in pools]
    assert launches(lambda: select(scores, modality, counts, 4))


@pytest.mark.parametrize(
    ("rows", "dtype", "most"),
    [("one", torch.float32, 12), ("one", torch.bfloat16, 13), ("even", torch.float32, 13)],
)
def test_a_fine_cut_launches_few_kernels(rows, dtype, most):
    """Four to score (one more at batch 2 or in bfloat16), four to select, four to gather.

    Gathered are hidden states, slots, position embeddings and position ids.
    """
    extra = [beyond(BATCHES[rows], fastav(KEEP, start=2), layers, dtype) for layers in (5, 6, 7)]
    assert extra[2] - extra[1] == extra[1] - extra[0] <= most


@pytest.mark.parametrize("rows", ["one", "even"])
def test_a_global_cut_costs_later_layers_nothing(rows):
    plan = fastav(KEEP, start=2, drop=0)
    assert beyond(BATCHES[rows], plan, 3) == beyond(BATCHES[rows], plan, 6)


def held_entering(layer, plan, rows):
    """Bytes that a pruned prefill holds where a layer is entered; weights and prompts not counted."""
    model, (inputs, layouts), held = there(), inputs_of(rows), []
    with prune(model, plan, layouts=layouts, adapter=TinyAdapter()), Alive() as alive, torch.inference_mode():
        handle = model.model.layers[layer].register_forward_pre_hook(lambda *_: held.append(alive.bytes()))
        model(**inputs, logits_to_keep=1)
        handle.remove()
    return held[0]


LONG = prompt(video=400, audio=200)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("omnizip", "window-diversity", "given")])
def test_what_a_method_asked_for_is_gone_once_it_has_chosen(method):
    def plan(name):
        return Plan((Step(layers="2", method=name, keep=Keep(media=Tokens(20))),), name)

    assert held_entering(4, plan(method), [LONG]) <= held_entering(4, plan("position"), [LONG])


def test_dropped_tokens_are_gone_after_the_layer_that_drops_them():
    keep = Keep(media=Tokens(20))
    early, late = (Plan((Step(layers=layer, method="position", keep=keep),), layer) for layer in ("2", "3"))
    features, dropped = tiny_model().config.hidden_size, 580
    # of each dropped token the keys and values of a layer, which are half as wide as the hidden states each
    assert held_entering(5, late, [LONG]) - held_entering(5, early, [LONG]) == 4 * features * dropped


@torch.inference_mode()
def test_a_cache_that_is_cut_by_rollout_sees_its_own_layer_too():
    model, ids, keep = tiny_model(), ROWS[0], Keep(media=Tokens(9))
    of_cache = Plan((Step(layers="3", method="rollout", keep=keep, cache_only=True),))
    with prune(model, of_cache, adapter=TinyAdapter()):
        cache = of_output(model(ids, use_cache=True))
    with prune(model, Plan((Step(layers="4", method="rollout", keep=keep),)), adapter=TinyAdapter()) as pruning:
        model(ids)
    assert cache.layers[3].slots.tolist() == pruning.slots()[-1][1].tolist()
