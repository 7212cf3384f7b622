"""A model that accelerate spreads over devices is pruned as one that is all in one place."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import fastav
from fastav.adapter import plan_named
from fastav.budgets import Share
from fastav.cache_argument import as_argument, of_output
from fastav.engines.transformers import Decoding, TransformersEngine, prune
from fastav.engines.transformers.devices import running_on
from fastav.engines.transformers.generation import cuda_graphs
from fastav.plan import Keep, Plan, Step
from fastav.presets import NONE
from fastav.pruning.rollout import LayerAttention
from fastav.registry import METHODS
from support import flash
from support.cases import PLAN, ROWS, rules_of
from support.launches import launches
from support.oracle import oracle_logits
from support.pairs import pairwise
from support.pretended import CPU, FIRST, SECOND, Mixed, pretended, spread
from support.tiny import TinyAdapter, pad_left, tiny_model
from support.toy import scene_request

BATCH = pad_left(ROWS)
HALF = Keep(media=Share(0.5))


def by(method: str, layers: str = "2..4", **more: Any) -> Plan:
    return Plan((Step(layers=layers, method=method, keep=HALF, **more),), method)


PLANS = {
    "unpruned": NONE,
    "fastav": PLAN,
    "caches": by("last-query", cache_only=True),
    "caches by position": by("position", cache_only=True),
    "caches by rollout": by("rollout", cache_only=True),
    "caches by keys": by("dart", cache_only=True),
    "the layer about to run": by("own-text-queries", "0..4"),
    "earlier caches": by("last-query", earlier_caches=True),
}
LOOPS: dict[str, Mapping[str, Any]] = {
    "generate": {},
    "our loop": {"custom_generate": Decoding(TinyAdapter(), capture=False)},
    "fixed shapes": {"custom_generate": Decoding(TinyAdapter(), capture=True)},
}
SPREADS: dict[str, Callable[[Any], Any]] = {
    "halves": lambda model: spread(model, model.model.layers, lambda i: i >= 3),
    "inputs with the late ones": lambda model: spread(model, model.model.layers, lambda i: i >= 4, main=SECOND),
    "in turns": lambda model: spread(model, model.model.layers, lambda i: i % 2 == 1),
}


@pytest.fixture(scope="module", params=SPREADS)
def model(request: Any) -> Any:
    return SPREADS[request.param](tiny_model())


def on_one(attention: str = "sdpa") -> Any:
    """The model under the same hooks, all of it on `FIRST`."""
    model = tiny_model(attention)
    return spread(model, model.model.layers, lambda _: False)


@pytest.fixture(scope="module")
def plain() -> Any:
    return on_one()


def there(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to(FIRST) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def generated(model: Any, inputs: Mapping[str, Any], plan: Plan, **more: Any) -> tuple[Tensor, Tensor, Any]:
    """The tokens, the logits of every step, and how many tokens each layer ran on."""
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with prune(model, plan, adapter=TinyAdapter()) as pruning:
        out = model.generate(**inputs, **options | more)
        return out.sequences.cpu(), torch.stack(out.logits).cpu(), pruning.tokens()


def assert_same(model: Any, plain: Any, plan: Plan, inputs: Mapping[str, Any] = BATCH, **more: Any) -> None:
    """What is computed is the same, but for how copies lie in memory."""
    with pretended():
        found = generated(model, there(inputs), plan, **more)
    key = str(inputs["input_ids"].tolist()), plan, str(more)
    assert_equal(found, once(plain, key, lambda: generated(plain, there(inputs), plan, **more)))


def once(plain: Any, key: Any, run: Callable[[], Any]) -> Any:
    """What the model on one device gives, which is the same for all ways to spread it."""
    known = plain.__dict__.setdefault("known_to_tests", {})
    if key not in known:
        with pretended():
            known[key] = run()
    return known[key]


def assert_equal(found: tuple[Tensor, Tensor, Any], expected: tuple[Tensor, Tensor, Any]) -> None:
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() < 1e-5
    assert found[2] == expected[2]


# layers ask their own weights where they are, whatever the plan and whoever decodes
@pytest.mark.parametrize(("model", "plan", "loop"), pairwise(SPREADS, PLANS, LOOPS), indirect=["model"])
def test_it_says_what_the_model_on_one_device_says(model: Any, plain: Any, plan: str, loop: str) -> None:
    assert_same(model, plain, PLANS[plan], **LOOPS[loop])


@pytest.mark.parametrize("model", ["in turns"], indirect=True)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "given"])
def test_every_method_does(model: Any, plain: Any, method: str) -> None:
    assert_same(model, plain, by(method), max_new_tokens=2)


@pytest.mark.parametrize("rows", [ROWS[:1], [ROWS[0]] * 2], ids=["one", "even"])
def test_prompts_without_padding_do(model: Any, plain: Any, rows: Any) -> None:
    assert_same(model, plain, PLAN, {"input_ids": torch.cat(rows)})


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=["one", "two"])
@pytest.mark.parametrize("plan", ["fastav", "caches", "the layer about to run", "earlier caches"])
def test_beams_do(model: Any, plain: Any, plan: str, options: Any) -> None:
    assert_same(model, plain, PLANS[plan], **options)


def test_a_later_turn_does(model: Any, plain: Any) -> None:
    def turns(model: Any) -> Tensor:
        with pretended(), torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()):
            cache = of_output(model(ROWS[0].to(FIRST), use_cache=True))
            return model(torch.tensor([[5, 6, 7]], device=FIRST), **as_argument(cache)).logits.cpu()

    assert (turns(model) - once(plain, "later turn", lambda: turns(plain))).abs().max() < 1e-5


@pytest.mark.parametrize("plan", PLANS)
def test_new_media_in_a_later_turn_do(model: Any, plain: Any, plan: str) -> None:
    def turns(model: Any) -> Tensor:
        with pretended(), torch.no_grad(), prune(model, PLANS[plan], adapter=TinyAdapter()) as pruning:
            cache, inputs = DynamicCache(config=model.config), there(BATCH)
            model(**inputs, **as_argument(cache))
            more = torch.cat([inputs["attention_mask"], inputs["attention_mask"]], dim=1)
            with pruning.turn():
                model(inputs["input_ids"], attention_mask=more, **as_argument(cache))
            mask = torch.cat([more, more[:, -1:]], dim=1)
            return model(inputs["input_ids"][:, -1:], attention_mask=mask, **as_argument(cache)).logits.cpu()

    assert (turns(model) - once(plain, f"new media {plan}", lambda: turns(plain))).abs().max() < 1e-5


def test_given_scores_do(model: Any, plain: Any) -> None:
    scores = torch.rand(ROWS[0].shape, generator=torch.Generator().manual_seed(0))

    def logits(model: Any) -> Tensor:
        with pretended(), torch.no_grad(), prune(model, by("given"), adapter=TinyAdapter(), scores=scores):
            return model(ROWS[0].to(FIRST)).logits.cpu()

    assert (logits(model) - logits(plain)).abs().max() < 1e-5


def test_attention_is_shown_where_its_layer_is(model: Any) -> None:
    shown: list[set[torch.device]] = []

    def see(inputs: LayerAttention) -> None:
        shown.append({part.device for part in inputs if isinstance(part, Tensor)})

    with pretended(), torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()) as pruning, pruning.observe(see):
        model(**there(BATCH))
    assert {len(devices) for devices in shown} == {1}
    assert set().union(*shown) == {FIRST, SECOND}


def test_it_says_what_a_mask_does(model: Any) -> None:
    ids, plain = ROWS[1], tiny_model()
    with pretended(), torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()):
        logits = model(ids.to(FIRST)).logits[0, -1].cpu()
    assert (logits - oracle_logits(plain, ids, ids.shape[1], rules_of(ids))[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("attention", ["eager", flash.NAME])
def test_other_kernels_do(attention: str, loop: Any) -> None:
    assert_same(SPREADS["in turns"](tiny_model(attention)), on_one(attention), PLAN, **loop)


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        by("rollout"),
        by("rollout", cache_only=True),
        by("own-last-query", "0..4"),
        by("last-query", earlier_caches=True),
    ],
    ids=["fastav", "rows", "caches", "the layer about to run", "earlier caches"],
)
def test_a_prefill_never_waits(model: Any, plan: Plan) -> None:
    layouts = TinyAdapter().layouts(TinyAdapter().config(), {"input_ids": ROWS[0]})
    with pretended(), torch.no_grad(), prune(model, plan, layouts=layouts, adapter=TinyAdapter()):
        given = ROWS[0].to(FIRST)
        assert launches(lambda: model(given, logits_to_keep=1))


@pytest.fixture(scope="module")
def engines() -> tuple[TransformersEngine, TransformersEngine]:
    """The embedded model as it is, and spread."""
    first, second = (cast(TransformersEngine, fastav.pipeline("tiny", device="cpu").engine) for _ in range(2))
    spread(second.model, cast(Any, second.adapter.decoder(second.model)).layers, lambda i: i % 2 == 0)
    return first, second


@pytest.mark.parametrize("plan", ["fastav", "omnizip"])
def test_an_engine_answers_alike(engines: Any, plan: str) -> None:
    requests = [scene_request(), scene_request("What do you hear?", seed=4)]
    chosen = plan_named(plan, engines[0].adapter)
    wanted = engines[0].generate(requests, chosen, max_new_tokens=4)
    with pretended():
        answers = engines[1].generate(requests, chosen, max_new_tokens=4)
    for expected, found in zip(wanted, answers, strict=True):
        assert found.token_ids == expected.token_ids
        assert found.tokens_per_layer == expected.tokens_per_layer


def test_a_trace_is_the_same(engines: Any) -> None:
    plan = plan_named("fastav", engines[0].adapter)
    expected = engines[0].trace(scene_request(), plan)
    with pretended():
        found = engines[1].trace(scene_request(), plan)
    np.testing.assert_allclose(found.rollout, expected.rollout, atol=1e-5)


def test_steps_are_not_captured(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are those of a model whose devices something else than accelerate sees to."""
    monkeypatch.setattr(cuda_graphs, "CAPTURING", {"cpu", FIRST.type})
    assert not cuda_graphs.captures(model)
    other = tiny_model()
    assert cuda_graphs.captures(other)
    with pretended(), torch.no_grad():
        other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.to(FIRST), requires_grad=False)
    assert running_on(other) == (CPU, FIRST)
    assert not cuda_graphs.captures(other)


# --- the measure


def test_devices_do_not_mix() -> None:
    with pretended():
        _try_to_mix()


def _try_to_mix() -> None:
    first, second = torch.ones(3, device=FIRST), torch.ones(3, device=SECOND)
    assert torch.equal((first + second.to(FIRST)).cpu(), torch.full((3,), 2.0))
    assert first.copy_(second).device == FIRST
    assert first[torch.tensor([0, 2])].tolist() == [1, 1]
    for mix in (
        lambda: first + second,
        lambda: first + torch.ones(3),
        lambda: first[second.long()],
        lambda: torch.cat([first, second]),
        lambda: first.gather(0, second.long()),
        lambda: torch.where(first > 0, first, second),
        lambda: first.index_copy_(0, second.long(), first),
        lambda: first.masked_fill(second > 0, 1.0),
    ):
        with pytest.raises(Mixed):
            mix()
