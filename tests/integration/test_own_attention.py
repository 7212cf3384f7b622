"""Scores by the attention of the layer about to run: what they cost, what they leave behind, and what is refused."""

import threading
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from test_compiled_layers import by_regions, checkpointed, decorated, hooked, in_place, one_by_one
from test_no_trace import state_of
from test_windows import STYLES, built
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastav.budgets import Share
from fastav.engines.transformers import Pruning, TransformersEngine, prune
from fastav.errors import UnsupportedModel, UnsupportedPlan
from fastav.plan import Keep, Plan, Step
from support.cases import ROWS, generate
from support.tiny import TinyAdapter, pad_left, prompt, tiny_model
from support.turns import converse, expected

HALF, MOST = Keep(media=Share(0.5)), Keep(media=Share(0.7))
PLAN = Plan(
    (
        Step(layers="0", method="own-text-queries", keep=MOST),
        Step(layers="3..4", method="own-last-query", keep=MOST),
    )
)
INPUTS = pad_left(ROWS)
TEXT = prompt(video=0, audio=0, before=4, after=0, seed=9)
CPU = torch.device("cpu")


def logits(model: Any, inputs: dict[str, torch.Tensor] = INPUTS) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def pruned(model: Any, plan: Plan = PLAN) -> Pruning:
    return prune(model, plan, adapter=TinyAdapter())


def assert_exact(model: Any, outer: Any = None) -> None:
    """Against the oracle on the weights of `model`; outer: what is run."""
    with pruned(outer or model) as pruning:
        said = converse(outer or model, pruning, [ROWS[:2], [TEXT, ROWS[2]]], [[2, 2], [2, 2]])
    for row, answers in enumerate(said.logits):
        wanted = expected(model, said, row, PLAN)
        assert max((found - wanted[place]).abs().max() for place, found in answers) < 1e-4


def test_norm_and_projections_run_twice_and_nothing_else() -> None:
    model, calls = tiny_model(), {}
    parts = dict(model.model.layers[3].named_modules()) | {"layer": model.model.layers[3]}
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    with pruned(model):
        logits(model)
    twice = {"self_attn", "input_layernorm", *(f"self_attn.{name}_proj" for name in "qkv")}
    assert {name for name, count in calls.items() if count == 2} == twice
    assert {name for name, count in calls.items() if count == 1} == {*parts} - twice


def test_a_prompt_that_loses_nothing_costs_nothing() -> None:
    model, calls = tiny_model(), []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(None))
    with pruned(model):
        logits(model, pad_left([TEXT]))
    assert len(calls) == 6


def test_each_layers_attention_is_observed_once() -> None:
    model, seen = tiny_model(), []
    with pruned(model) as pruning, pruning.observe(lambda attention: seen.append(attention.slots.shape[1])):
        logits(model)
    with pruned(model) as pruning:
        logits(model)
    assert seen == widths(pruning)


def widths(pruning: Pruning) -> list[int]:
    """The number of columns that each layer ran on."""
    after, counts, width = {layer: slots.shape[1] for layer, slots in pruning.slots()}, [], 0
    for layer in range(6):
        width = after.get(layer, width)
        counts.append(width)
    return counts


def test_in_a_cache_it_is_the_attention_of_the_preceding_layers_method() -> None:
    found = []
    for method in ("own-last-query", "last-query", "own-text-queries", "text-queries"):
        plan = Plan((Step(layers="2..4", method=method, keep=HALF, cache_only=True),))
        out, _ = generate(tiny_model(), INPUTS, plan)
        found.append(torch.stack(out.logits))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert not torch.equal(found[0], found[2])


# --- layers that something wraps


@pytest.mark.parametrize("wrap", [one_by_one, by_regions, checkpointed, hooked, decorated, in_place])
def test_wrapped_layers_are_pruned_as_they_are_without(wrap: Any) -> None:
    plain, model = tiny_model(), tiny_model()
    model = wrap(model, backend="eager") if wrap is in_place else wrap(model)
    (theirs, _), (ours, _) = generate(plain, INPUTS, PLAN), generate(model, INPUTS, PLAN)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert (torch.stack(ours.logits) - torch.stack(theirs.logits)).abs().max() < 1e-4
    torch._dynamo.reset()


# PEFT asks for an attribute that transformers 5.24 has renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_peft_take_part_in_the_scores() -> None:
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False)
    outer = get_peft_model(tiny_model(), lora).eval()
    inner: Any = outer.base_model.model
    assert_exact(inner, outer)


@pytest.mark.parametrize("classes", [None, ["Qwen2DecoderLayer"], ["Qwen2Attention"]], ids=["leaves", "layers", "attn"])
def test_weights_that_are_offloaded_are_so_again(classes: Any) -> None:
    plain, model = tiny_model(), tiny_model()
    cpu_offload(model, execution_device=CPU, preload_module_classes=classes)
    wanted = generate(plain, INPUTS, PLAN)[0]
    offloaded: list[bool] = []

    def look(_: Any) -> None:  # between the two calls of a layer
        offloaded.append(all(weight.is_meta for weight in model.parameters()))

    with pruned(model) as pruning, pruning.record_cuts(look):
        logits(model)
    assert offloaded == [True] * 3
    with pytest.warns(UserWarning, match=r"calling .generate"):  # on `meta`, says transformers
        found = generate(model, INPUTS, PLAN)[0]
    assert (torch.stack(found.logits) - torch.stack(wanted.logits)).abs().max() < 1e-4


# --- what is left


def test_the_model_is_restored() -> None:
    model = tiny_model()
    before, plain = state_of(model), logits(model)
    with pruned(model):
        once = logits(model)
        assert torch.equal(logits(model), once)
        assert not torch.equal(once, plain)
    assert state_of(model) == before
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("call", [1, 2], ids=["while scores are computed", "in the layer itself"])
def test_after_an_exception_the_next_forward_is_right(call: int) -> None:
    model, calls = tiny_model(), []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) == call:
            raise RuntimeError("on purpose")

    with pruned(model):
        wanted = logits(model)
    before = state_of(model)
    with pruned(model):
        handle = model.model.layers[3].self_attn.k_proj.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            logits(model)
        handle.remove()
        assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
        assert torch.equal(logits(model), wanted)
    assert state_of(model) == before


def test_one_pruned_model_serves_two_threads() -> None:
    model = tiny_model()
    with pruned(model):
        wanted = [logits(model, {"input_ids": row}) for row in ROWS[:2]]
        found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

        def work(index: int) -> None:
            for _ in range(20):
                found[index].append(logits(model, {"input_ids": ROWS[index]}))

        threads = [threading.Thread(target=work, args=(index,)) for index in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, results in found.items():
        assert len(results) == 20
        assert all(torch.equal(result, wanted[index]) for result in results)


# --- what is refused


@pytest.mark.parametrize("style", ["a window for all layers", "behind some layers", "every second layer"])
def test_a_layer_that_sees_only_a_window_is_refused_and_the_one_behind_it_is_not(style: str) -> None:
    model, windows = built(style), STYLES[style][2]
    for layer, window in enumerate(windows):
        plan = Plan((Step(layers=str(layer), method="own-last-query", keep=HALF),))
        if window is None:
            TransformersEngine.check(model.config, plan, adapter=TinyAdapter())
            continue
        with pytest.raises(UnsupportedPlan, match=f"layer {layer} attends within a window, so its queries"):
            TransformersEngine.check(model.config, plan, adapter=TinyAdapter())


def test_attention_that_cannot_be_observed_is_refused() -> None:
    model = tiny_model()
    model.model.layers[3].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pruned(model), pytest.raises(UnsupportedModel, match="does not call its attention by transformers' interface"):
        logits(model)
