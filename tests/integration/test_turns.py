"""Later turns that bring new media: every step equals the oracle over the whole conversation."""

import pytest
import torch

from fastav.engines.transformers import prune
from fastav.methods import *  # noqa
from fastav.plan import Keep, Plan, Share, Step
from fastav.presets import fastav, plus
from fastav.recipes import recipe
from fastav.registry import METHODS
from support import flash
from support.cases import PLAN
from support.tiny import TinyAdapter, prompt, tiny_model
from support.turns import converse, expected

MIXED = [
    Step(layers=str(layer), method=method, keep=Keep(media=Share(keep)), cache_only=alone)
    for layer, method, keep, alone in (
        (1, "window", 0.8, False),
        (3, "rollout", 0.7, False),
        (4, "last-query", 0.5, True),
        (5, "text-queries", 0.6, False),
    )
]
PLANS = {
    "fastav": PLAN,
    "fastav-plus": plus(),
    "fastv": recipe("fastv"),
    "mixed": Plan(tuple(MIXED)),
    **{
        name: Plan(tuple(Step(layers=layer, method=name, keep=Keep(media=Share(0.6))) for layer in ("2", "4")))
        for name in sorted(METHODS)
        if name != "given"
    },
    **{
        name + "cache": Plan(
            tuple(
                Step(layers=layer, method=name, keep=Keep(media=Share(0.6)), cache_only=layer == "3")
                for layer in ("2", "3")
            )
        )
        for name in ("window", "rollout", "dart")
    },
}
TEXT = prompt(video=0, audio=0, before=4, after=0, seed=9)
MEDIA = [prompt(seed=1), prompt(before=2, video=12, audio=7, after=4, seed=4)]
CONVERSATIONS = {"media in turns 1 and 3": [MEDIA[0], TEXT, MEDIA[1]], "media in turns 1 and 2": [*MEDIA, TEXT]}


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", flash.NAME])
def test_every_step_equals_the_oracle(plan, turns, attention):
    model, plan = tiny_model(attention), PLANS[plan]
    with prune(model, plan, adapter=TinyAdapter()) as pruning:
        said = converse(model, pruning, [[ids] for ids in CONVERSATIONS[turns]], [[3], [2], [3]])
    logits = expected(model, said, 0, plan)
    assert len(said.logits[0]) == 8
    plain = expected(model, said, 0, Plan())
    for place, found in said.logits[0]:
        assert (found - logits[place]).abs().max() < 1e-4
    assert (plain - logits).abs().max() > 1e-2
