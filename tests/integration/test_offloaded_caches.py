"""Caches whose layers wait on the host: the same numbers, on a CPU that stands for a device and its host."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fastav.budgets import Share
from fastav.cache_argument import as_argument, of_output
from fastav.engines.transformers import prune
from fastav.plan import Keep, Plan, Step
from support.cases import PLAN, ROWS
from support.pretended import CPU, FIRST, pretended, spread
from support.tiny import TinyAdapter, pad_left, tiny_model

MOST = Keep(media=Share(0.7))
PLANS = {
    "fastav": PLAN,
    "before all": Plan((Step(layers="0", method="position", keep=MOST),)),
    "caches": Plan((Step(layers="2..4", method="last-query", keep=MOST, cache_only=True),)),
    "the layer about to run": Plan((Step(layers="0..4", method="own-last-query", keep=MOST),)),
    "earlier caches": Plan((Step(layers="2..4", method="last-query", keep=MOST, earlier_caches=True),)),
}
BATCH = pad_left(ROWS)


class _Stream(nullcontext[None]):
    """A stream whose work is always done."""

    def wait_stream(self, other: "_Stream") -> None:
        pass


@pytest.fixture(autouse=True)
def without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies between the device and its host take place at once."""
    monkeypatch.setattr(torch, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: _Stream())


@pytest.fixture(scope="module")
def model() -> Any:
    whole = tiny_model()
    return spread(whole, whole.model.layers, lambda _: False)


def there() -> dict[str, torch.Tensor]:
    return {name: value.to(FIRST) for name, value in BATCH.items()}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("plan", PLANS)
def test_an_offloaded_cache_is_the_same(model, plan, options):
    answers = []
    for kind in ("offloaded", None):
        with pretended(), prune(model, PLANS[plan], adapter=TinyAdapter()):
            out = model.generate(
                **there(),
                **options,
                max_new_tokens=4,
                do_sample=False,
                cache_implementation=kind,
                output_logits=True,
                return_dict_in_generate=True,
            )
        answers.append(out)
    offloaded, plain = answers
    assert {layer.keys.device for layer in of_output(offloaded).layers[:-1]} >= {CPU}
    assert {layer.keys.device for layer in of_output(plain).layers} == {FIRST}
    assert torch.equal(offloaded.sequences.cpu(), plain.sequences.cpu())
    for ours, theirs in zip(offloaded.logits, plain.logits, strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu())


@pytest.mark.parametrize("lazy", [False, True], ids=["by its configuration", "as layers come"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_later_turn_is_the_same(model, plan, lazy):
    def turns(**offloading: Any) -> list[torch.Tensor]:
        logits = []
        with pretended(), torch.no_grad(), prune(model, PLANS[plan], adapter=TinyAdapter()) as pruning:
            cache, inputs = DynamicCache(config=None if lazy else model.config, **offloading), there()
            mask = inputs["attention_mask"][:, :0]
            for ids, real in ((inputs["input_ids"], inputs["attention_mask"]),) * 2:
                mask = torch.cat([mask, real], dim=1)
                with pruning.turn():
                    logits.append(model(ids, attention_mask=mask, **as_argument(cache)).logits.cpu())
                mask = torch.cat([mask, mask[:, -1:]], dim=1)
                logits.append(model(ids[:, -1:], attention_mask=mask, **as_argument(cache)).logits.cpu())
        return logits

    for ours, theirs in zip(turns(offloading=True), turns(), strict=True):
        assert torch.equal(ours, theirs)
