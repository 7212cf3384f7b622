"""Steps that drop tokens from caches alone: decoding hides them in that layer; prefill and other layers go on."""

import pytest
import torch

from fastav.budgets import Share, Tokens
from fastav.cache_argument import of_output
from fastav.engines.transformers import TransformersEngine, prune
from fastav.errors import PlanError, UnsupportedPlan
from fastav.plan import Keep, Plan, Step
from support import flash
from support.cases import ROWS, STEPS
from support.tiny import TinyAdapter, pad_left, tiny_model

HALF = Keep(media=Share(0.5))
ALONE = Plan((Step(layers="2..4", method="last-query", keep=HALF, cache_only=True),))
BESIDE = Plan((Step(layers="3", method="position", keep=Keep(media=Share(0.7))), *ALONE.steps))


def oracle(model, ids, answer, plan):
    """Logits of every step, by forwards without a cache: generated queries do not see what a layer's cache lacks."""
    layout = TinyAdapter().layouts(model.config, {"input_ids": ids})[0]
    prompt, new, depth = ids.shape[1], len(answer), 6
    media = torch.from_numpy(layout.modality > 0)
    token_cuts = {cut.layer: cut for cut in plan.schedule(layout, depth)}
    cache_cuts = {cut.layer: cut for cut in plan.cache_schedule(layout, depth)}
    hide, latest, handles = torch.zeros(prompt, dtype=torch.bool), {}, []

    def best(score, there, count):
        left = [i for i in range(prompt) if media[i] and there[i]]
        kept = sorted(left, key=lambda i: (-float(score[i]), i))[:count]
        return torch.tensor([i in set(left) - set(kept) for i in range(prompt)])

    def before(index):
        def hook(module, args, kwargs):
            nonlocal hide
            if index in token_cuts:
                (count,) = token_cuts[index].counts.values()
                hide = hide | best(-torch.arange(prompt).float(), ~hide, count)
            mask = kwargs["attention_mask"].clone()
            unseen = hide[None] & ~torch.eye(prompt, dtype=torch.bool)
            mask[..., :prompt, :prompt].masked_fill_(unseen, torch.finfo(mask.dtype).min)
            gone = hide.clone()
            if index in cache_cuts:
                (count,) = cache_cuts[index].counts.values()
                gone = gone | best(own[index], ~hide, count) if index in own else gone
            mask[..., prompt:, :prompt].masked_fill_(gone, torch.finfo(mask.dtype).min)
            kwargs["attention_mask"] = mask
            return args, kwargs

        return hook

    def after(index):
        def hook(module, args, output):
            latest[index] = output[1][0, :, prompt - 1, :prompt].mean(0)

        return hook

    own: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        handles += [
            layer.self_attn.register_forward_pre_hook(before(index), with_kwargs=True),
            layer.self_attn.register_forward_hook(after(index)),
        ]
    whole = torch.cat([ids, answer[None, :-1]], dim=1)
    with torch.no_grad():
        model(whole, attention_mask=torch.ones_like(whole), use_cache=False)  # the prompt's scores
        own, hide = dict(latest), torch.zeros(prompt, dtype=torch.bool)
        logits = model(whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[0, prompt - 1 :]
    for handle in handles:
        handle.remove()
    assert len(logits) == new
    return logits


@pytest.mark.parametrize("plan", [ALONE, BESIDE])
@pytest.mark.parametrize("attention", ["sdpa", "eager", flash.NAME])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_every_step_equals_the_oracle(plan, attention, rows):
    model, eager = tiny_model(attention), tiny_model("eager")
    with prune(model, plan, adapter=TinyAdapter()) as pruning:
        out = model.generate(
            **pad_left(rows), max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    for row, ids in enumerate(rows):
        expected = oracle(eager, ids, out.sequences[row, -STEPS:], plan)
        logits = torch.stack([step[row] for step in out.logits])
        assert (logits - expected).abs().max() < 1e-4
        plain = oracle(eager, ids, out.sequences[row, -STEPS:], Plan())
        assert (logits - plain).abs().max() > 1e-2, "the plan changes nothing here"
        layout = TinyAdapter().layouts(model.config, {"input_ids": ids})[0]
        assert [sum(layer.values()) for layer in pruning.tokens()[row]] == list(plan.tokens(layout, 6))


def test_the_cache_holds_what_the_plan_says():
    model, ids = tiny_model(), ROWS[0]
    with prune(model, BESIDE, adapter=TinyAdapter()):
        cache = of_output(model.generate(ids, max_new_tokens=1, return_dict_in_generate=True))
    layout = TinyAdapter().layouts(model.config, {"input_ids": ids})[0]
    held = BESIDE.cache_tokens(layout, 6)
    assert [layer.keys.shape[2] for layer in cache.layers] == list(held)
    assert held[2] < held[1] == held[0] == len(layout)
    assert held[3] < held[5] == BESIDE.tokens(layout, 6)[5]


def test_it_travels_as_json_and_has_a_fingerprint_of_its_own():
    assert Plan.from_json(BESIDE.to_json()) == BESIDE
    tokens = Plan((Step(layers="2..4", method="last-query", keep=HALF),))
    assert tokens.fingerprint != ALONE.fingerprint
    assert "cache_only" not in tokens.to_json()


def test_what_makes_no_sense_is_refused():
    twice = Plan((*ALONE.steps, Step(layers="4", method="position", keep=Keep(media=Tokens(1)), cache_only=True)))
    with pytest.raises(PlanError, match="two cache-only steps"):
        twice.cache_cuts(6)
    sliding = tiny_model(layer_types=["full_attention"] * 3 + ["sliding_attention"] * 3, use_sliding_window=True)
    with pytest.raises(UnsupportedPlan, match="layer 3 attends within a window"):
        TransformersEngine.check(sliding.config, ALONE, adapter=TinyAdapter())
    with pytest.raises(PlanError, match="cache_only must be true or false"):
        Plan.from_json(ALONE.to_json().replace('"cache_only": true', '"cache_only": 1'))
