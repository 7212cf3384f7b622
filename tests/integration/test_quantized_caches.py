"""Caches that pack keys and values, and caches on the host: equal to the same cache over the masked model.

Models of a quantized cache compute in float64, softmax too: else two kernels would round a value that lies near the
border of two steps to one or the other.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

from fastav.budgets import Share
from fastav.cache_argument import as_argument, of_output
from fastav.engines.transformers import prune
from fastav.errors import UnsupportedPlan
from fastav.plan import Keep, Plan, Step
from fastav.presets import NONE
from support.cases import PLAN
from support.masked import masked_steps, rules_of
from support.tiny import TinyAdapter, layout_of, pad_left, prompt, tiny_model

HALF = Keep(media=Share(0.5))
PLANS = {
    "fastav": PLAN,
    "early": Plan((Step(layers="0", method="position", keep=HALF),)),
    "last query": Plan((Step(layers="2..4", method="last-query", keep=Keep(media=Share(0.7))),)),
    "the layer about to run": Plan((Step(layers="0..3", method="own-last-query", keep=Keep(media=Share(0.8))),)),
}
FIRST, SECOND = prompt(seed=1), prompt(before=2, video=12, audio=7, after=4, seed=4)
TEXT = prompt(video=0, audio=0, before=4, after=0, seed=9)
HEAD = 16


@pytest.fixture(autouse=True)
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention of float64 without its detour over float32."""
    softmax: Any = torch.nn.functional.softmax

    def of_its_own_type(scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return softmax(scores, dim=dim, dtype=None if scores.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", of_its_own_type)


def double(attention: str = "sdpa") -> Any:
    return tiny_model(attention).double()


def quantized(config: Any, **changes: Any) -> QuantizedCache:
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    return QuantizedCache("quanto", config, **{"q_group_size": HEAD, "residual_length": 5} | changes)


def steps(turns: Sequence[torch.Tensor], answer: int) -> list[tuple[torch.Tensor, bool]]:
    """The forwards of a conversation, and whether each begins a turn: answers are so many given tokens, one by one."""
    make, forwards = torch.Generator().manual_seed(0), []
    for ids in turns:
        said = torch.randint(1, 60, (answer,), generator=make)
        forwards += [(ids, True), *((token[None, None], False) for token in said)]
    return forwards


def pruned(model: Any, plan: Plan, forwards: Any, cache: Any) -> list[torch.Tensor]:
    logits = []
    with torch.no_grad(), prune(model, plan, adapter=TinyAdapter()) as pruning:
        for ids, is_turn in forwards:
            if is_turn:
                with pruning.turn():
                    logits.append(model(ids, **as_argument(cache)).logits[0])
            else:
                logits.append(model(ids, **as_argument(cache)).logits[0])
    return logits


def masked(plan: Plan, forwards: Any, cache: Any) -> list[torch.Tensor]:
    model = double("eager")
    ruled = [(ids, rules_of(plan, layout_of(ids[0]), 6) if is_turn else None) for ids, is_turn in forwards]
    return masked_steps(model, model.model.layers, ruled, cache)


def difference(found: Any, expected: Any) -> float:
    return max(float((a[-1] - b[-1]).abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("nbits", [4, 2])
@pytest.mark.parametrize("group", [HEAD, 8])
@pytest.mark.parametrize("residual", [2, 5, 40, 128])
@pytest.mark.parametrize("plan", PLANS)
def test_a_quantized_cache_equals_one_over_the_masked_model(plan, residual, group, nbits):
    """Turns, answers and residual lengths such that layers pack during turns and answers, and not at all."""
    forwards, plan = steps([FIRST, TEXT, SECOND], 7), PLANS[plan]
    settings = {"nbits": nbits, "q_group_size": group, "residual_length": residual}
    model = double()
    caches = [quantized(model.config, **settings) for _ in range(3)]
    found = pruned(model, plan, forwards, caches[0])
    assert difference(found, masked(plan, forwards, caches[1])) < 1e-6
    assert difference(found, masked(NONE, forwards, caches[2])) > 1e-2, "the plan changes nothing here"
    exact = pruned(model, plan, forwards, DynamicCache(config=model.config))
    assert difference(found, exact) > 1e-3, "the cache quantizes nothing"
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert (ours.keys.ndim, ours.residual_length <= theirs.residual_length) == (theirs.keys.ndim, True)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_makes_a_quantized_cache_of_its_own(options):
    """Rows of a padded batch, and beams, say what each prompt says alone over a cache that packs alike."""
    model, settings = double(), {"q_group_size": HEAD, "residual_length": 3}
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    more = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "quantized", "cache_config": settings}
    answers = []
    for rows in ([FIRST, SECOND], [FIRST], [SECOND]):
        with prune(model, PLAN, adapter=TinyAdapter()):
            out = model.generate(**pad_left(rows), **more, **options, output_logits=True, return_dict_in_generate=True)
        assert type(of_output(out)) is QuantizedCache
        answers.append(out)
    together, *alone = answers
    for row, one in enumerate(alone):
        assert torch.equal(together.sequences[row, -5:], one.sequences[0, -5:])
        if not options:
            logits = [step[row] - own[0] for step, own in zip(together.logits, one.logits, strict=True)]
            assert max(float(step.abs().max()) for step in logits) < 1e-6


def _fill(model: Any, cache: Any, plan: Plan = PLAN) -> Any:
    with torch.no_grad(), prune(model, plan, adapter=TinyAdapter()):
        model(FIRST, **as_argument(cache))
    return cache


def test_quantized_caches_that_scale_tokens_together_are_refused():
    model = double()
    with pytest.raises(UnsupportedPlan, match="groups of 32 values scales tokens of 16 values together"):
        _fill(model, quantized(model.config, q_group_size=32))
    for axis in ("axis_key", "axis_value"):
        with pytest.raises(UnsupportedPlan, match="axis -1 scales a channel of several tokens"):
            _fill(model, quantized(model.config, **{axis: -1}))
    for flag in ("cache_only", "earlier_caches"):
        alone = Plan((Step(layers="2", method="position", keep=HALF, **{flag: True}),))
        with pytest.raises(UnsupportedPlan, match="would round them twice"):
            _fill(model, quantized(model.config), alone)
    unpruned = _fill(model, quantized(model.config, axis_key=-1, q_group_size=8), NONE)
    assert unpruned.get_seq_length() == FIRST.shape[1]


def test_hqq_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: True)
    monkeypatch.setattr("transformers.cache_utils.HQQQuantizer", None, raising=False)
    model = double()
    cache = QuantizedCache("hqq", model.config, axis_key=1, axis_value=1, q_group_size=HEAD)
    with pytest.raises(UnsupportedPlan, match="HQQ stops to improve its scales"):
        _fill(model, cache)


def test_what_a_packed_cache_cannot_do_is_refused():
    model = double()
    cache = _fill(model, quantized(model.config))
    layer = cache.layers[-1]
    with pytest.raises(UnsupportedPlan, match="cannot be cropped"):
        layer.crop(-1)
    with pytest.raises(UnsupportedPlan, match="cannot be repeated"):
        layer.batch_repeat_interleave(2)
    with pytest.raises(UnsupportedPlan, match="cannot be selected"):
        layer.batch_select_indices(torch.tensor([0]))
    with torch.no_grad(), pytest.raises(UnsupportedPlan, match="used without pruning"):
        model(TEXT, **as_argument(cache))
