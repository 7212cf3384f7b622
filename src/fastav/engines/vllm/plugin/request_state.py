"""One prompt on its way through the decoder: how many of its tokens every layer keeps, and which.

How many is known from the layout before anything runs. Which ones too, where methods look at the layout alone; where
they look at scores, it is found out while the whole prompt runs, by the same `Prefill` as in the engine transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from fastav.adapter import ModelAdapter
from fastav.engines.transformers import gather, staging
from fastav.engines.transformers.prefill import Prefill, Schedule
from fastav.engines.vllm.guards import MODELS, Asked, named
from fastav.errors import PlanError
from fastav.layout import Layout, Modality
from fastav.method import Signal
from fastav.plan_check import require_applied

Stays = Bool[np.ndarray, " tokens"]


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One prompt.

    made: of which model and plan. length: its tokens. held: how many of them each layer keeps. stays: which, in each
    layer; None where scores decide. prefill: finds out which, where scores decide and the prompt is about to run.
    """

    made: "Passages"
    length: int
    held: tuple[int, ...]
    stays: tuple[Stays, ...] | None
    prefill: Prefill | None = None

    @property
    def whole(self) -> bool:
        """Whether every layer keeps all of it."""
        return min(self.held) == self.length

    def lengths(self, computed: int) -> Int[np.ndarray, " layers"]:
        """How many tokens every layer's cache holds when the first `computed` of prompt and answer have run."""
        if computed >= self.length:
            return self._held + (computed - self.length)
        return np.array([self.before(layer, computed) for layer in range(len(self.held))])

    @cached_property
    def _held(self) -> Int[np.ndarray, " layers"]:
        return np.array(self.held)

    def before(self, layer: int, computed: int) -> int:
        """How many tokens a layer's cache holds when the first `computed` of prompt and answer have run."""
        if computed >= self.length:
            return self.held[layer] + computed - self.length
        return int(self.stays[layer][:computed].sum()) if self.stays is not None else 0


class Passages:
    """Makes the passages of one model under one plan."""

    def __init__(self, asked: Asked) -> None:
        self.asked, self.depth = asked, asked.depth

    @cached_property
    def schedule(self) -> Schedule:
        """Of the plan, as the engine transformers knows it."""
        asked = self.asked
        return Schedule(
            plan=asked.plan, config=asked.text, cuts=asked.cuts, cache_cuts=(), owners=self.depth, depth=self.depth
        )

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers that are cut, in order."""
        return tuple(sorted({layer for layer, _ in self.schedule.cuts}))

    @cached_property
    def wanted(self) -> dict[int, set[Signal]]:
        """What methods ask of the attention of which layers."""
        return self.schedule.wanted()

    def of(self, inputs: Mapping[str, Any], device: torch.device | None = None) -> Passage:
        """The passage of a prompt.

        inputs: its ids [1, tokens] and what of its media the adapter reads. device: where it will run; None if it is
        only to be counted.
        Raises: PlanError, PlanNotApplied.
        """
        layout, held = self.counts(inputs)
        if min(held) == len(layout):
            stays = (np.ones(len(layout), bool),) * self.depth
        else:
            stays = self._stays(layout) if self.asked.by_layout else None
            if stays is not None:
                require_applied(held, [int(layer.sum()) for layer in stays], "cache is to hold {} tokens")
        prefill = self._prefill(layout, device) if stays is None and device is not None else None
        return Passage(made=self, length=len(layout), held=held, stays=stays, prefill=prefill)

    def counts(self, inputs: Mapping[str, Any]) -> tuple[Layout, tuple[int, ...]]:
        """The layout of a prompt, and how many of its tokens each layer keeps.  inputs: as `of`.  Raises: PlanError."""
        (layout,) = self.asked.adapter.layouts(self.asked.config, inputs)
        return layout, self.asked.plan.tokens(layout, self.depth)

    def _stays(self, layout: Layout) -> tuple[Stays, ...]:
        """What stays in each layer, by a prefill of tokens that have no features."""
        prefill = self._prefill(layout, torch.device("cpu"))
        hidden, now, layers = torch.empty(1, len(layout), 0), np.ones(len(layout), bool), []
        for layer in range(self.depth):
            if layer in self.layers:
                hidden = prefill.cut(layer, hidden)
                now = np.zeros(len(layout), bool)
                now[prefill.slots[0].numpy()] = True
            layers.append(now)
        return tuple(layers)

    def _prefill(self, layout: Layout, device: torch.device) -> Prefill:
        length = len(layout)
        counts, widths = staging.stage_cuts(self.asked.plan, [layout], self.depth, device)
        slots = torch.arange(length, device=device)[None]
        return Prefill(
            schedule=self.schedule,
            prompt=staging.stage_prompt([layout], length, device),
            length=length,
            slots=slots,
            valid=None,
            stored=dict.fromkeys(range(self.schedule.first), gather.Kept(slots, None)),
            counts=counts,
            widths=widths,
            asking=int(staging.question(layout).sum()),
            sounding=layout.count(Modality.AUDIO),
            kept=[(0, slots)],
        )


class Plans:
    """The plans by which requests run: the server's, or one that a request names."""

    def __init__(self, asked: Asked, chunked_prefill: bool) -> None:
        self.default = Passages(asked)
        self._chunked_prefill = chunked_prefill
        self._named = lru_cache(maxsize=64)(self._made)  # a request may say anything

    def of(self, said: Any) -> Passages:
        """The plan of a request.  said: what it says of plans, None if nothing.

        Raises: PlanError, UnsupportedPlan.
        """
        if said is None:
            return self.default
        if not isinstance(said, str):
            raise PlanError(f"a request names its plan by a text, got {said!r}", "a preset, a recipe, or a plan's JSON")
        return self._named(said)

    def _made(self, said: str) -> Passages:
        return Passages(named(self.default.asked, said, self._chunked_prefill))


def inputs_of(adapter: ModelAdapter, ids: Sequence[int], media: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an adapter reads the layout of a prompt off: its ids, and the features of its media that layouts need.

    media: what vLLM's processor made of each, in the order of the prompt.
    """
    inputs: dict[str, Any] = {"input_ids": np.asarray(ids)[None]}
    for name, joined in MODELS[adapter.name].items():
        if found := [item[name].data.numpy() for item in media if name in item]:
            inputs[name] = joined(found)
    return inputs
