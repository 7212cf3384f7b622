"""On a CUDA device: a pruned prefill never waits for it, and gives what a CPU gives."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fastav.budgets import Share, Tokens
from fastav.engines.transformers import prune
from fastav.plan import Keep, Plan, Step
from fastav.presets import fastav, trim
from fastav.registry import RECIPES
from support.tiny import TinyAdapter, prompt, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PLANS = [
    fastav(Keep(audio=Tokens(4), video=Tokens(14)), drop=0.2),
    fastav(Keep(audio=Tokens(4)), drop=0, name="global"),
    trim(),
    Plan((Step(layers="1", method="random", keep=Keep(media=Share(0.5))),), "random"),
]
# but for omnizip: the encoders that it asks wait for the device themselves
RECIPE_PLANS = [make() for name, make in RECIPES.items() if name != "omnizip"]
IDS = prompt(seed=1)
LAYOUTS = TinyAdapter().layouts(None, {"input_ids": IDS})


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def logits(model, plan, ids, layouts=LAYOUTS):
    with prune(model, plan, layouts=layouts, adapter=TinyAdapter()) as pruning:
        out = model(input_ids=ids, logits_to_keep=1).logits
        return out, pruning.tokens()


def test_the_check_notices_a_wait():
    flag = torch.ones(1, device="cuda")
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        flag.item()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("plan", [*PLANS, *RECIPE_PLANS], ids=lambda plan: plan.name)
@torch.inference_mode()
def test_a_pruned_prefill_never_waits_for_the_device(plan, rows):
    model = tiny_model().to("cuda")
    ids = IDS.repeat(rows, 1).to("cuda")
    with prune(model, plan, layouts=LAYOUTS * rows, adapter=TinyAdapter()):
        model(input_ids=ids, logits_to_keep=1)  # what happens only once may wait
        with waiting_is_an_error():
            model(input_ids=ids, logits_to_keep=1)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_the_device_gives_what_the_cpu_gives(plan):
    expected, kept = logits(tiny_model(), plan, IDS)
    found, kept_there = logits(tiny_model().to("cuda"), plan, IDS.to("cuda"))
    assert kept_there == kept
    assert (found.cpu() - expected).abs().max() < 1e-3
