"""Decoders whose last layers share the keys and values of earlier ones, with sliding windows between (Gemma 3n, 4)."""

from typing import Any

import pytest
import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, Gemma4ForCausalLM, Gemma4TextConfig

from fastav.budgets import Share
from fastav.cache_argument import of_output
from fastav.engines.transformers import prune
from fastav.errors import UnsupportedPlan
from fastav.layout import MEDIA
from fastav.plan import Keep, Plan, Step
from support.families._tiny import randomized
from support.masked import masked_logits, rules_of
from support.tiny import TinyAdapter, pad_left, prompt

DEPTH, SHARED = 12, 4  # layers 8 to 11 share those of 6 and 7
HALF = Keep(media=Share(0.5))
TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 3,
    "sliding_window": 12,
    "num_kv_shared_layers": SHARED,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ROWS = [prompt(seed=1), prompt(before=5, video=20, audio=3, after=2, seed=2)]
PLANS = {
    "between": Plan(
        (
            Step(layers="2", method="position", keep=HALF),
            Step(layers="4", method="last-query", keep=Keep(media=Share(0.8))),
        )
    ),
    "of the source layers": Plan((Step(layers="7", method="position", keep=HALF),)),
    "before all": Plan((Step(layers="0", method="position", keep=HALF),)),
}


def gemma3n(attention: str) -> Any:
    config = Gemma3nTextConfig(**TEXT, altup_num_inputs=3, laurel_rank=8, activation_sparsity_pattern=[0.0] * DEPTH)
    return randomized(Gemma3nForCausalLM(config), attention)


def gemma4(attention: str) -> Any:
    return randomized(Gemma4ForCausalLM(Gemma4TextConfig(**TEXT, global_head_dim=32)), attention)


@pytest.mark.parametrize("make", [gemma3n, gemma4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
@pytest.mark.parametrize("name", PLANS)
def test_every_step_equals_the_masked_model(make, attention, rows, name):
    model, inputs, adapter = make(attention), pad_left(rows), TinyAdapter()
    with prune(model, PLANS[name], adapter=adapter) as pruning:
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    for row, ids in enumerate(rows):
        (layout,) = adapter.layouts(model.config, {"input_ids": ids})
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        rules = rules_of(PLANS[name], layout, DEPTH)
        expected = masked_logits(model, model.model.layers, alone, out.sequences[row, -4:], rules)
        logits = torch.stack([step[row] for step in out.logits])
        assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
        plain = masked_logits(model, model.model.layers, alone, out.sequences[row, -4:], {})
        assert (logits - plain).abs().max() > 1e-2 * expected.abs().max(), "the plan changes nothing here"
        kept = [sum(layer.values()) for layer in pruning.tokens()[row]]
        assert kept == list(PLANS[name].tokens(layout, DEPTH))


@pytest.mark.parametrize("make", [gemma3n, gemma4])
def test_logits_of_text_at_the_end_are_exact_when_more_than_one_is_asked_for(make):
    model, ids, adapter = make("sdpa"), ROWS[0], TinyAdapter()
    (layout,) = adapter.layouts(model.config, {"input_ids": ids})
    with prune(model, PLANS["between"], adapter=adapter), torch.no_grad():
        logits = model(input_ids=ids, logits_to_keep=3).logits[0]
        whole = model(input_ids=ids).logits[0]
    assert (logits - whole[-3:]).abs().max() < 1e-4 * whole.abs().max()
    rules = rules_of(PLANS["between"], layout, DEPTH)
    expected = masked_logits(model, model.model.layers, {"input_ids": ids}, torch.zeros(1, dtype=torch.long), rules)
    assert (logits[-1] - expected[-1]).abs().max() < 1e-3 * expected.abs().max()
    assert sum(layout.count(m) for m in MEDIA) > 3


def test_a_step_in_layers_that_share_is_refused():
    model = gemma4("sdpa")
    late = Plan((Step(layers="9", method="position", keep=HALF),))
    with pytest.raises(UnsupportedPlan, match="layer 9 has no keys"), prune(model, late, adapter=TinyAdapter()):
        pass


@pytest.mark.parametrize("make", [gemma3n, gemma4])
def test_a_sliding_layer_holds_no_more_than_its_window(make):
    model, plan = make("sdpa"), PLANS["before all"]
    with prune(model, plan, adapter=TinyAdapter()):
        cache = of_output(model.generate(**pad_left(ROWS), max_new_tokens=1, return_dict_in_generate=True))
    held = [layer.keys.shape[-2] for layer in cache.layers[: DEPTH - SHARED]]
    assert max(len(row[0]) for row in ROWS) - 14 > 12
    assert held == [11, 11, 11, held[3]] * 2  # with the next query itself, a window of 12
    assert held[3] > 12
