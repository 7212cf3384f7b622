"""The engine equals the mask-based oracle: logits of every step, before tokens."""

import pytest
import torch

from fastav.budgets import Share
from fastav.engines.transformers import prune
from fastav.plan import Keep, Plan
from fastav.presets import fastav
from support import flash
from support.cases import PLAN, ROWS, STEPS, generate, rules_of
from support.oracle import oracle_logits
from support.tiny import TinyAdapter, pad_left, tiny_model


@pytest.mark.parametrize("attention", ["sdpa", "eager", flash.NAME])
@pytest.mark.parametrize("row", range(3))
def test_every_step_equals_the_oracle(attention, row):
    model, ids = tiny_model(attention), ROWS[row]
    out, pruning = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    n = ids.shape[1]
    with torch.no_grad():
        expected = oracle_logits(model, out.sequences, n, rules_of(ids))[n - 1 : -1]
    assert (torch.cat(out.logits) - expected).abs().max() < 1e-4
    kept = [sum(layer.values()) for layer in pruning.tokens()[0]]
    assert kept == list(PLAN.tokens(TinyAdapter().layouts(model.config, {"input_ids": ids})[0], 6))
    assert kept[-1] < n


@pytest.mark.parametrize("attention", ["sdpa", "eager", flash.NAME])
def test_a_left_padded_batch_equals_the_oracle_row_by_row(attention):
    model = tiny_model(attention)
    out, _ = generate(model, pad_left(ROWS))
    for b, ids in enumerate(ROWS):
        n = ids.shape[1]
        whole = torch.cat([ids, out.sequences[b : b + 1, -STEPS:]], dim=1)
        with torch.no_grad():
            expected = oracle_logits(model, whole, n, rules_of(ids))[n - 1 : -1]
        assert (torch.stack([step[b] for step in out.logits]) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager", flash.NAME])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_keeping_everything_changes_nothing(attention, rows):
    model, inputs = tiny_model(attention), pad_left(rows)
    with torch.no_grad():
        plain = model(**inputs).logits
        with prune(model, fastav(Keep(audio=Share(1.0)), drop=1e-9), adapter=TinyAdapter()):
            kept = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (plain - kept)[real].abs().max() < 1e-5


def test_the_empty_plan_changes_nothing():
    model, ids = tiny_model(), ROWS[0]
    with torch.no_grad(), prune(model, Plan(), adapter=TinyAdapter()):
        inside = model(ids).logits
    with torch.no_grad():
        assert torch.equal(inside, model(ids).logits)
