"""A cut that vanishes is an error, whatever made it vanish; told by shapes alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma3nForCausalLM, Gemma3nTextConfig

from fastav import cache_argument
from fastav.budgets import Share
from fastav.engines.transformers import Decoding, prune
from fastav.engines.transformers.hooks import Pruning
from fastav.engines.transformers.kv_cache import PrunedLayer
from fastav.errors import PlanNotApplied
from fastav.plan import Keep, Plan, Step
from integration.test_shared_keys import DEPTH, TEXT
from support.families._tiny import randomized
from support.tiny import TinyAdapter, pad_left, prompt, tiny_model

HALF = Keep(media=Share(0.5))
PLANS = {
    "a cut": Plan((Step(layers="2", method="position", keep=HALF),)),
    "a cut by scores": Plan((Step(layers="2", method="last-query", keep=HALF),)),
    "a cut that merges": Plan((Step(layers="2", method="dart", keep=HALF),)),
    "a cache-only step": Plan((Step(layers="2", method="last-query", keep=HALF, cache_only=True),)),
    "cache-only steps of many layers": Plan((Step(layers="1..5", method="window", keep=HALF, cache_only=True),)),
    "a cut by its own layer's scores": Plan((Step(layers="2", method="own-last-query", keep=HALF),)),
    "earlier caches": Plan((Step(layers="2..3", method="last-query", keep=HALF, earlier_caches=True),)),
    "both": Plan(
        (
            Step(layers="2", method="position", keep=HALF),
            Step(layers="4", method="last-query", keep=HALF, cache_only=True),
        )
    ),
}
BATCHES = {
    "one": pad_left([prompt(seed=1)]),
    "padded": pad_left([prompt(seed=1), prompt(before=5, video=20, audio=3, after=2, seed=2)]),
}
NEW = {"max_new_tokens": 3, "do_sample": False}
WAYS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "forward": lambda model, inputs: model(**inputs),
    "forward, as a tuple": lambda model, inputs: model(**inputs, return_dict=False),
    "forward with a cache": lambda model, inputs: model(**inputs, **cache_argument.as_argument(DynamicCache())),
    "generate": lambda model, inputs: model.generate(**inputs, **NEW),
    "Decoding": lambda model, inputs: model.generate(**inputs, **NEW, custom_generate=Decoding(TinyAdapter())),
}


def lose_hooks(model: Any, pruning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks on layer 2 are gone."""
    for hooks in (model.model.layers[2]._forward_pre_hooks, model.model.layers[2]._forward_hooks):
        hooks.clear()


def lose_all_hooks(model: Any, pruning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        layer._forward_pre_hooks.clear()
        layer._forward_hooks.clear()


def lose_the_name(model: Any, pruning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers calls the cache something else, as when 5.24 came out."""
    monkeypatch.setattr(cache_argument, "_by_preference", lambda: ("a_name_of_former_days",))


@contextmanager
def pruned(model: Any, plan: Plan) -> Iterator[Pruning]:
    with prune(model, plan, adapter=TinyAdapter()) as pruning, torch.inference_mode():
        yield pruning


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_takes_effect_passes(name: str, batch: str, way: str) -> None:
    model = tiny_model()
    with pruned(model, PLANS[name]):
        WAYS[way](model, BATCHES[batch])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lose", [lose_hooks, lose_all_hooks, lose_the_name])
@pytest.mark.parametrize("name", PLANS)
def test_a_cut_that_vanishes_is_an_error(name: str, lose: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with pruned(model, PLANS[name]) as pruning:
        lose(model, pruning, monkeypatch)
        with pytest.raises(PlanNotApplied, match="the plan did not take effect: "):
            WAYS[way](model, BATCHES["padded"])
        monkeypatch.undo()
        assert pruning._running is None


def test_without_a_cache_layers_are_counted_all_the_same() -> None:
    model = tiny_model()
    with pruned(model, PLANS["both"]):
        model(**BATCHES["padded"], use_cache=False)
        lose_hooks(model, None, pytest.MonkeyPatch())
        with pytest.raises(PlanNotApplied, match="6 layers, 5 were seen"):
            model(**BATCHES["padded"], use_cache=False)


def test_a_cache_that_holds_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = tiny_model(), PrunedLayer.update

    def update(self: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        before = plain(self, keys, values, *args, **kwargs)
        self.keys, self.values = self.keys[:, :, 1:], self.values[:, :, 1:]
        return before

    monkeypatch.setattr(PrunedLayer, "update", update)
    with (
        pruned(model, PLANS["a cut"]),
        pytest.raises(PlanNotApplied, match="cache holds 21 tokens, and by the plan 22"),
    ):
        model(**BATCHES["one"])


def test_layers_that_share_keys_or_slide_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Gemma3nTextConfig(**TEXT, altup_num_inputs=3, laurel_rank=8, activation_sparsity_pattern=[0.0] * DEPTH)
    model = randomized(Gemma3nForCausalLM(config), "sdpa")
    for layer in (0, 2, 5):
        plan = Plan((Step(layers=str(layer), method="position", keep=HALF),))
        with pruned(model, plan):
            for way in ("generate", "Decoding", "forward"):
                WAYS[way](model, BATCHES["padded"])
            model.model.layers[layer]._forward_pre_hooks.clear()
            with pytest.raises(PlanNotApplied, match="did not take effect"):
                model.generate(**BATCHES["padded"], **NEW)
    with pruned(model, Plan((Step(layers="3", method="last-query", keep=HALF, cache_only=True),))):
        WAYS["generate"](model, BATCHES["padded"])
        lose_the_name(model, None, monkeypatch)
        with pytest.raises(PlanNotApplied, match="did not take effect"):
            WAYS["generate"](model, BATCHES["padded"])


@pytest.mark.parametrize("fixed", [False, True])
def test_a_step_that_reaches_no_buffers_is_an_error(fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    forward = type(model).forward

    def without_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] == 1:
            kwargs.pop(cache_argument.installed_name())
        return forward(self, *args, **kwargs)

    decoding = Decoding(TinyAdapter(), capture=fixed)
    assert model.generate(**BATCHES["one"], **NEW, custom_generate=decoding).shape[1] > 3
    monkeypatch.setattr(type(model), "forward", without_cache)
    with pytest.raises(PlanNotApplied, match="did not reach the buffers"):
        model.generate(**BATCHES["one"], **NEW, custom_generate=decoding)
