"""The engine equals the mask-based oracle: logits of every step, before tokens."""

import pytest
import torch
from support.oracle import drop_lowest, keep_only_first, oracle_logits
from support.tiny import AUDIO_ID, VIDEO_ID, TinyAdapter, pad_left, prompt, tiny_model

from fastav.engines.transformers import prune
from fastav.plan import Keep, Plan, Share, Tokens
from fastav.presets import fastav

STEPS = 6
PLAN = fastav(Keep(audio=Tokens(4), video=Tokens(14)), drop=0.2)
ROWS = [prompt(seed=1), prompt(before=5, video=20, audio=3, after=2, seed=2), prompt(video=0, audio=9, seed=3)]


def rules_of(ids: torch.Tensor, depth: int = 6) -> dict:
    audio, video = ids[0] == AUDIO_ID, ids[0] == VIDEO_ID
    first = [keep_only_first(audio, 4), keep_only_first(video, 14)]
    rules = {depth // 2: lambda score, hide: first[1](score, first[0](score, hide))}
    return rules | {layer: drop_lowest(audio | video, 0.2) for layer in range(depth // 2 + 1, depth)}


def generate(model, inputs, plan=PLAN, **options):
    with prune(model, plan, adapter=TinyAdapter()) as pruning:
        out = model.generate(
            **inputs,
            **{"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            | options,
        )
    return out, pruning


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_left_padded_batch_equals_the_oracle_row_by_row(attention):
    model = tiny_model(attention)
    out, _ = generate(model, pad_left(ROWS))
    for b, ids in enumerate(ROWS):
        n = ids.shape[1]
        whole = torch.cat([ids, out.sequences[b : b + 1, -STEPS:]], dim=1)
        with torch.no_grad():
            expected = oracle_logits(model, whole, n, rules_of(ids))[n - 1 : -1]
        assert (torch.stack([step[b] for step in out.logits]) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
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
