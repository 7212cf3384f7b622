"""A second clip in a later turn, in every family: equal to the model's own run over the whole conversation, masked."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from inspect import signature
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from fastav.adapter import ModelAdapter, Prepared
from fastav.budgets import Share
from fastav.cache_argument import as_argument
from fastav.engines.transformers import prune
from fastav.errors import UnsupportedPlan
from fastav.media import Clip
from fastav.models.tiny import TinyAdapter
from fastav.plan import Keep, Plan, Step
from fastav.presets import NONE
from fastav.request import Request
from support.family import NAMES, PLAN, family_of
from support.masked import masked_conversation, rules_of

EARLY = Plan((Step(layers="0", method="position", keep=Keep(media=Share(0.6))),))
ANSWER = 3  # tokens
TYPES = "mm_token_type_ids"


class Talk:
    """Two turns with a clip each, which are equally long, so that what the processors return can be joined."""

    def __init__(self, name: str) -> None:
        self.name, self.plan, fps, samples = name, PLAN, 10, None
        if name == "tiny":
            self.adapter: ModelAdapter = TinyAdapter()
            self.model, processor = self.adapter.load(self.adapter.checkpoint, dtype=torch.float32)
        else:
            family = family_of(name)
            self.adapter, self.model, processor, self.plan = (
                family.adapter,
                family.model(),
                family.processor,
                family.plan,
            )
            fps, samples = getattr(family.module, "FPS", fps), getattr(family.module, "SOUND", None)
        self.prepared: list[Prepared] = []
        for seed, question in enumerate(("What moves?", "What?")):
            make = np.random.default_rng(seed)
            audio = make.uniform(-0.5, 0.5, samples or 24 * 16_000 // fps).astype(np.float32)
            clip = Clip.from_arrays(
                frames=make.integers(0, 256, (24, 24, 32, 3), dtype=np.uint8),
                fps=fps,
                waveform=audio if self.adapter.supports_audio else None,
                sample_rate=16_000 if self.adapter.supports_audio else None,
            )
            self.prepared.append(self.adapter.prepare(processor, [Request(clip=clip, question=question)]))
        self.decoder = cast(Any, self.adapter.decoder(self.model))
        self.depth = len(self.decoder.layers)
        self.parts = [part for one in self.prepared for part in (dict(one.inputs), _answer(one.inputs))]
        self.whole = _joined(self.parts)
        ends = np.cumsum([part["input_ids"].shape[1] for part in self.parts]).tolist()
        self.spans = list(zip([0, *ends], ends, strict=False))
        self.expected: dict[Plan, torch.Tensor] = {}
        self.positions: Any = torch.arange(ends[-1])[None]

    def masked(self, plan: Plan) -> torch.Tensor:
        """The logits of the whole conversation; also notes the positions that the model gives it."""
        if plan not in self.expected:
            turns = [
                (*self.spans[2 * turn], rules_of(plan, one.layouts[0], self.depth))
                for turn, one in enumerate(self.prepared)
            ]
            note = self.decoder.register_forward_pre_hook(self._note, with_kwargs=True)
            try:
                self.expected[plan] = masked_conversation(self.model, self.decoder.layers, self.whole, turns)
            finally:
                note.remove()
        return self.expected[plan]

    def _note(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if kwargs.get("position_ids") is not None:
            self.positions = kwargs["position_ids"]

    @torch.no_grad()
    def pruned(self, plan: Plan, *, all_types: bool = True, **options: Any) -> tuple[torch.Tensor, Any]:
        """Logits of the answers, and of the token before each, by four forwards over one cache; and the last record."""
        cache, logits = DynamicCache(config=self.decoder.config), []
        with prune(self.model, plan, adapter=self.adapter) as pruning:
            for number, (part, (start, end)) in enumerate(zip(self.parts, self.spans, strict=True)):
                inputs = {**part, "attention_mask": torch.ones(1, end, dtype=torch.long)}
                if TYPES in part and all_types:
                    inputs[TYPES] = self.whole[TYPES][:, :end]
                given = [self.prepared[number // 2].layouts[0]]
                with nullcontext() if number % 2 else pruning.turn(given):
                    positions = self.positions[..., start:end]
                    out = self.model(**inputs, position_ids=positions, **as_argument(cache), **options)
                logits.append(out.logits[0, 0 if number % 2 else -1 :])
            return torch.cat(logits), pruning.tokens()


def _answer(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What follows a prompt: its own last tokens, which are text."""
    ids = inputs["input_ids"][:, -ANSWER:]
    same = {name: torch.zeros_like(ids) for name in (TYPES, "token_type_ids") if name in inputs}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **same}


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Arguments for the whole: what is per token one after the other, media as a batch of them."""
    whole: dict[str, Any] = {}
    for name in parts[0]:
        named = [part for part in parts if name in part]
        values = [part[name] for part in named]
        if isinstance(values[0], torch.Tensor):
            per_token = all(part[name].shape == part["input_ids"].shape for part in named)
            whole[name] = torch.cat(values, dim=1 if per_token else 0)
        else:
            whole[name] = [*values[0], *values[1]] if isinstance(values[0], list) else values[0]
    return whole


talk_about = cache(Talk)


@pytest.fixture(params=["tiny", *NAMES])
def talk(request: Any) -> Talk:
    return talk_about(request.param)


@pytest.mark.parametrize("early", [False, True])
def test_every_step_equals_the_masked_model(talk: Talk, early: bool) -> None:
    plan = EARLY if early else talk.plan
    expected, plain = talk.masked(plan), talk.masked(NONE)
    found, tokens = talk.pruned(plan)
    n, places = len(expected), []
    for (_, end), (_, last) in (talk.spans[:2], talk.spans[2:]):
        places += range(end - 1, last)
    assert places[-1] == n - 1
    assert (found - expected[places]).abs().max() < 1e-3 * expected.abs().max()
    assert (found - plain[places])[ANSWER + 1 :].abs().max() > 1e-2 * expected.abs().max(), "nothing is pruned"
    layout = talk.prepared[1].layouts[0]
    assert [sum(layer.values()) for layer in tokens[0]] == list(plan.tokens(layout, talk.depth))


def test_the_last_logits_alone_are_the_same(talk: Talk) -> None:
    if "logits_to_keep" not in signature(talk.model.forward).parameters:
        pytest.skip("the model computes all logits")
    talk.masked(NONE)
    expected, _ = talk.pruned(talk.plan)
    found, _ = talk.pruned(talk.plan, logits_to_keep=1)
    last = expected[[0, ANSWER, ANSWER + 1, -1]]
    assert (found - last).abs().max() < 1e-4 * expected.abs().max()


def test_images_that_attend_in_both_directions_need_the_types_of_all_tokens() -> None:
    talk = talk_about("gemma4_bidirectional")
    talk.masked(NONE)
    with pytest.raises(UnsupportedPlan, match="looks up mm_token_type_ids by the column of the whole conversation"):
        talk.pruned(talk.plan, all_types=False)
