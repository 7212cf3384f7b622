"""Steps that also cut the caches of earlier layers: the prefill stays, decoding reads what remains at the cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_windows import built

import fastav
from fastav.budgets import Share
from fastav.cache_argument import of_output
from fastav.engines.transformers import Decoding, TransformersEngine, prune
from fastav.errors import PlanError, UnsupportedModel, UnsupportedPlan
from fastav.plan import Keep, Plan, Step
from fastav.pruning.compiled import compile_plan
from support import flash
from support.cases import ROWS, STEPS, generate
from support.tiny import TinyAdapter, layout_of, pad_left, tiny_model
from support.turns import Conversation, expected

HALF, MOST = Keep(media=Share(0.5)), Keep(media=Share(0.7))


def cut(layers: str, method: str = "last-query", keep: Keep = MOST, **flags: bool) -> Step:
    return Step(layers=layers, method=method, keep=keep, **flags)


PLANS = {
    "one cut": Plan((cut("3", keep=HALF, earlier_caches=True),)),
    "behind a cut": Plan((cut("1", "position"), cut("4", earlier_caches=True))),
    "before others": Plan((cut("2", "own-last-query", earlier_caches=True), cut("3", "position"), cut("5"))),
    "two at one layer": Plan((cut("3", "position", earlier_caches=True), cut("3", "window"))),
    "beside a cache": Plan((cut("2", earlier_caches=True), cut("2..4", "window", HALF, cache_only=True))),
}
LOOPS: dict[str, dict[str, Any]] = {
    "generate": {},
    "our loop": {"custom_generate": Decoding(TinyAdapter(), capture=False)},
    "fixed shapes": {"custom_generate": Decoding(TinyAdapter(), capture=True)},
}


def without(plan: Plan) -> Plan:
    """The plan without what it does to earlier caches."""
    steps = tuple(Step.from_dict({**step.to_dict(), "earlier_caches": False}) for step in plan.steps)
    return Plan(steps, plan.name)


def oracle(model: Any, ids: torch.Tensor, sequence: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Logits that lead to each token behind a prompt."""
    prompt = ids.shape[1]
    whole = torch.cat([ids[0], sequence[-STEPS:]])
    return expected(model, Conversation([whole], [[(0, prompt)]], [[]]), 0, plan)[prompt - 1 : -1]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", flash.NAME])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one", "padded"])
def test_every_step_equals_the_oracle(name: str, attention: str, rows: Any) -> None:
    model, plan = tiny_model(attention), PLANS[name]
    out, pruning = generate(model, pad_left(rows), plan)
    for row, ids in enumerate(rows):
        found = torch.stack([step[row] for step in out.logits])
        assert (found - oracle(model, ids, out.sequences[row], plan)).abs().max() < 1e-4
        kept = oracle(model, ids, out.sequences[row], without(plan))
        assert (found[0] - kept[0]).abs().max() < 1e-4, "the prefill is the same"
        assert (found - kept).abs().max() > 1e-2, "decoding reads the same"
        assert [sum(layer.values()) for layer in pruning.tokens()[row]] == list(plan.tokens(layout_of(ids[0]), 6))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", PLANS)
def test_our_loop_says_what_generate_says(name: str, loop: str) -> None:
    model = tiny_model()
    for rows in (ROWS[:1], ROWS):
        (theirs, _), (ours, _) = (
            generate(model, pad_left(rows), PLANS[name], **LOOPS[one]) for one in ("generate", loop)
        )
        assert torch.equal(ours.sequences, theirs.sequences)
        assert (torch.stack(ours.logits) - torch.stack(theirs.logits)).abs().max() < 1e-4


@pytest.mark.parametrize("name", PLANS)
def test_caches_hold_what_the_plan_says(name: str) -> None:
    model, plan, ids = tiny_model(), PLANS[name], ROWS[0]
    until = plan.earlier_caches_until(6)
    with torch.no_grad(), prune(model, plan, adapter=TinyAdapter()) as pruning:
        cache = of_output(model(ids, use_cache=True))
    layout = layout_of(ids[0])
    held = plan.cache_tokens(layout, 6)
    assert [layer.keys.shape[2] for layer in cache.layers] == list(held)
    assert set(held[:until]) == {plan.tokens(layout, 6)[until]}
    assert sum(held) < sum(without(plan).cache_tokens(layout, 6))
    (_, remaining) = [slots for slots in pruning.slots() if slots[0] <= until][-1]
    for layer in cache.layers[:until]:
        assert torch.equal(layer.slots, remaining)
        assert layer.get_seq_length() == ids.shape[1]


def test_beams_and_copies_equal_the_oracle() -> None:
    model, plan, ids = tiny_model(), PLANS["before others"], ROWS[0]
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    out, _ = generate(model, pad_left([ids]), plan, **options)
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        rows = oracle(model, ids, sequence, plan).log_softmax(-1)
        assert abs(float(rows.gather(1, sequence[-STEPS:, None]).sum()) / STEPS - float(score)) < 1e-4


def test_the_last_of_several_decides() -> None:
    several = Plan((cut("2..4", earlier_caches=True), cut("5")))
    last = Plan((cut("2..3"), cut("4", earlier_caches=True), cut("5")))
    assert several.earlier_caches_until(6) == last.earlier_caches_until(6) == 4
    (ours, _), (theirs, _) = (generate(tiny_model(), pad_left(ROWS), plan) for plan in (several, last))
    assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))


def test_a_prompt_that_loses_nothing_is_as_it_was() -> None:
    text = ROWS[0][:, -5:]
    model, plan = tiny_model(), PLANS["one cut"]
    with torch.no_grad(), prune(model, plan, adapter=TinyAdapter()):
        kept = of_output(model(text, use_cache=True))
    with torch.no_grad():
        plain = of_output(model(text, use_cache=True))
    for ours, theirs in zip(kept.layers, plain.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)


def test_a_chat_goes_on_from_its_file(tmp_path: Path) -> None:
    """What the cache holds is accounted for, and is the same when it is read from a file."""
    plan = Plan((cut("middle", "own-last-query", HALF, earlier_caches=True), cut("middle+1..")), "earlier")
    clip = Path(fastav.__file__).parent / "assets" / "clips" / "triangle.mp4"
    pipe = fastav.pipeline(device="cpu", plan=plan)
    chat = pipe.chat()
    first, depth = chat.ask(clip, "what shape do you see?"), 12
    layers = [sum(layer.values()) for layer in first.tokens_per_layer]
    assert first.kv_bytes.ratio == pytest.approx((6 * layers[6] + sum(layers[6:])) / (depth * layers[0]))
    chat.save(tmp_path / "chat.safetensors")
    resumed = pipe.chat(resume=tmp_path / "chat.safetensors")
    with pytest.warns(fastav.FastAVWarning, match="an earlier question chose the tokens"):
        answers = [one.ask("what color is it?") for one in (chat, resumed)]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].kv_bytes == answers[1].kv_bytes


# --- plans


def test_it_travels_as_json_and_has_a_fingerprint_of_its_own() -> None:
    plan = PLANS["behind a cut"]
    assert Plan.from_json(plan.to_json()) == plan
    assert '"earlier_caches": true' in plan.to_json()
    assert "earlier_caches" not in without(plan).to_json()
    assert plan.fingerprint != without(plan).fingerprint
    with pytest.raises(PlanError, match="earlier_caches must be true or false, got 1"):
        Plan.from_json(plan.to_json().replace('"earlier_caches": true', '"earlier_caches": 1'))


def test_plans_that_make_no_sense_are_refused() -> None:
    with pytest.raises(PlanError, match="changes no other layer"):
        cut("3", cache_only=True, earlier_caches=True)
    with pytest.raises(PlanError, match="no layer comes before layer 0"):
        Plan((cut("0", "position", earlier_caches=True),)).earlier_caches_until(6)
    both = Plan((cut("4", earlier_caches=True), cut("3", cache_only=True)))
    layout = layout_of(ROWS[0][0])
    for ask in (both.earlier_caches_until, lambda depth: both.cache_tokens(layout, depth)):
        with pytest.raises(PlanError, match="cuts the cache of layer 3, and a step at layer 4 cuts it again"):
            ask(6)
    with pytest.raises(PlanError, match="cuts it again"), prune(tiny_model(), both, adapter=TinyAdapter()):
        pass


def test_a_range_that_begins_at_layer_0_or_ends_behind_the_last_one_is_none_of_these() -> None:
    assert Plan((cut("0..2", "position", earlier_caches=True),)).earlier_caches_until(6) == 2
    assert Plan((cut("6..", earlier_caches=True), cut("2"))).earlier_caches_until(6) == 0


def test_layers_whose_cache_is_a_window_are_refused() -> None:
    model, plan = built("every second layer"), Plan((cut("2", "position", earlier_caches=True),))
    with pytest.raises(UnsupportedPlan, match="layer 0 attends within a window, and its cache holds only the window"):
        TransformersEngine.check(model.config, plan, adapter=TinyAdapter())
    late = built("behind some layers")
    TransformersEngine.check(late.config, plan, adapter=TinyAdapter())


def test_layers_with_another_state_are_refused() -> None:
    model = tiny_model()
    model.config.layer_types = ["linear_attention", *["full_attention"] * 5]
    plan = PLANS["one cut"]
    compile_plan(without(plan), model.config, TinyAdapter())
    with pytest.raises(UnsupportedModel, match="caches of layers before 3 cannot be cut: a recurrent state"):
        compile_plan(plan, model.config, TinyAdapter())
