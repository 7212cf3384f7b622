"""A model whose weights accelerate keeps on the disk or the host is pruned as one that is all there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

import fastav
from fastav.adapter import plan_named
from fastav.budgets import Share
from fastav.engines.transformers import Decoding, TransformersEngine, devices, prune
from fastav.engines.transformers.generation import cuda_graphs
from fastav.errors import PlanNotApplied
from fastav.plan import Keep, Plan, Step
from fastav.presets import NONE
from support.cases import PLAN, ROWS, rules_of
from support.oracle import oracle_logits
from support.tiny import TinyAdapter, pad_left, tiny_model
from support.toy import scene_request
from support.turns import converse
from support.turns import expected as expected_of

CPU = torch.device("cpu")
BATCH = pad_left(ROWS)
HALF = Keep(media=Share(0.5))
CACHES = Plan((Step(layers="2..4", method="last-query", keep=HALF, cache_only=True),))
PLANS = {
    "unpruned": NONE,
    "fastav": PLAN,
    "caches": CACHES,
    "rollout": Plan((Step(layers="3", method="rollout", keep=HALF),)),
    "the layer about to run": Plan((Step(layers="1..4", method="own-last-query", keep=HALF),)),
    "earlier caches": Plan((Step(layers="2..4", method="last-query", keep=HALF, earlier_caches=True),)),
}
# transformers says of such models that they are on `meta`, and warns
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
PARTS = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{i}" for i in range(6))]


def on_disk(*parts: str) -> dict[str, str]:
    return {part: "disk" if part in parts else "cpu" for part in PARTS}


def from_pretrained(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "saved")
    where = on_disk("model.embed_tokens", "model.layers.1", "model.layers.4")
    return type(model).from_pretrained(folder / "saved", device_map=where, offload_folder=str(folder / "offloaded"))


OFFLOADED: dict[str, Callable[[Any, Path], Any]] = {
    "to the host": lambda model, _: cpu_offload(model, execution_device=CPU),
    "to the disk": lambda model, folder: disk_offload(model, str(folder), execution_device=CPU),
    "late layers": lambda model, folder: dispatch_model(
        model, on_disk("model.layers.4", "model.layers.5", "lm_head"), offload_dir=str(folder)
    ),
    "as it is loaded": from_pretrained,
}


@pytest.fixture(scope="module", params=OFFLOADED)
def offloaded(request: Any, tmp_path_factory: Any) -> Any:
    model = OFFLOADED[request.param](tiny_model(), tmp_path_factory.mktemp("offloaded"))
    assert any(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_model()


def generated(model: Any, plan: Plan, **more: Any) -> tuple[Any, Any]:
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with prune(model, plan, adapter=TinyAdapter()) as pruning:
        return model.generate(**BATCH, **options, **more), pruning.tokens()


@pytest.mark.parametrize("loop", [None, False, True], ids=["generate", "our loop", "fixed shapes"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_it_says_what_the_whole_model_says(offloaded: Any, plain: Any, plan: Plan, loop: bool | None) -> None:
    more = {} if loop is None else {"custom_generate": Decoding(TinyAdapter(), capture=loop)}
    (expected, kept), (found, found_kept) = generated(plain, plan), generated(offloaded, plan, **more)
    assert torch.equal(found.sequences, expected.sequences)
    assert (torch.stack(found.logits) - torch.stack(expected.logits)).abs().max() < 1e-4
    assert found_kept == kept


def test_it_says_what_a_mask_does(offloaded: Any, plain: Any) -> None:
    ids = ROWS[1]
    with prune(offloaded, PLAN, adapter=TinyAdapter()), torch.no_grad():
        logits = offloaded(input_ids=ids).logits[0, -1]
        expected = oracle_logits(plain, ids, ids.shape[1], rules_of(ids))[-1]
    assert (logits - expected).abs().max() < 1e-4


def test_new_media_in_a_later_turn_are_those_of_the_whole_model(offloaded: Any, plain: Any) -> None:
    with prune(offloaded, PLAN, adapter=TinyAdapter()) as pruning:
        said = converse(offloaded, pruning, [ROWS[:1], ROWS[1:2]], [[2], [2]])
    logits = expected_of(plain, said, 0, PLAN)
    assert max((found - logits[place]).abs().max() for place, found in said.logits[0]) < 1e-4


def test_a_cut_that_vanishes_is_an_error(offloaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastav.pruning.state.PruningState.cut", lambda self, index, hidden: hidden)
    with pytest.raises(PlanNotApplied), torch.no_grad(), prune(offloaded, PLAN, adapter=TinyAdapter()):
        offloaded(**BATCH)


def test_steps_are_not_captured(offloaded: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "CAPTURING", {"cpu", "meta"})
    assert cuda_graphs.captures(plain)
    assert not cuda_graphs.captures(offloaded)  # weights come and go, and a graph would read where they once were


def test_it_runs_where_the_hooks_say(offloaded: Any) -> None:
    assert devices.running_on(offloaded) == (CPU,)
    assert devices.input_device(offloaded) == CPU


@pytest.fixture(scope="module")
def engines() -> tuple[TransformersEngine, TransformersEngine]:
    """The embedded model as it is, and offloaded."""
    first, second = (cast(TransformersEngine, fastav.pipeline("tiny", device="cpu").engine) for _ in range(2))
    cpu_offload(second.model, execution_device=CPU)
    return first, second


@pytest.mark.parametrize("plan", ["fastav", "omnizip"])
def test_an_engine_answers_alike(engines: Any, plan: str) -> None:
    """Encoders too are offloaded; OmniZip looks at the weights of one outside of its forward."""
    requests = [scene_request(), scene_request("What do you hear?", seed=4)]
    chosen = plan_named(plan, engines[0].adapter)
    answers = [engine.generate(requests, chosen, max_new_tokens=4) for engine in engines]
    for expected, found in zip(*answers, strict=True):
        assert found.token_ids == expected.token_ids
        assert found.tokens_per_layer == expected.tokens_per_layer
    assert engines[1].device == "cpu"


def test_a_trace_is_the_same(engines: Any) -> None:
    plan = plan_named("fastav", engines[0].adapter)
    expected, found = (engine.trace(scene_request(), plan) for engine in engines)
    np.testing.assert_allclose(found.rollout, expected.rollout, atol=1e-5)
