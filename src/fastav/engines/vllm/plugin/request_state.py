"""A request under a plan: how many tokens of its prompt every layer keeps, and which.

The counts follow from the layout before anything runs. So do the tokens themselves where methods read the layout
alone; where they read scores, a `PruningState` selects them while the whole prompt runs, as in the engine
transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from fastav.engines.vllm.guards import PruningConfig, with_plan
from fastav.errors import PlanError
from fastav.layout import Layout
from fastav.method import Signal
from fastav.pruning.state import BroadcastIndices, PruningState
from fastav.pruning.verification import require_applied

KeepMask = Bool[np.ndarray, " tokens"]


@dataclass(frozen=True, kw_only=True)
class RequestState:
    """One request.

    runtime: of its model and plan. prompt_len: tokens of its prompt. prompt_kv_lens: how many of them each layer keeps.
    keep_masks: which ones, per layer; None where scores decide. prefill: selects them, where scores decide and the
    prompt is about to run.
    """

    runtime: "PlanRuntime"
    prompt_len: int
    prompt_kv_lens: tuple[int, ...]
    keep_masks: tuple[KeepMask, ...] | None
    prefill: PruningState | None = None

    @property
    def is_unpruned(self) -> bool:
        """Whether every layer keeps the whole prompt."""
        return min(self.prompt_kv_lens) == self.prompt_len

    def kv_lens(self, num_computed: int) -> Int[np.ndarray, " layers"]:
        """The tokens in every layer's cache once the first `num_computed` of prompt and answer have run."""
        if num_computed >= self.prompt_len:
            return self._prompt_kv_lens + (num_computed - self.prompt_len)
        return np.array([self.kv_len(layer, num_computed) for layer in range(len(self.prompt_kv_lens))])

    @cached_property
    def _prompt_kv_lens(self) -> Int[np.ndarray, " layers"]:
        return np.array(self.prompt_kv_lens)

    def kv_len(self, layer: int, num_computed: int) -> int:
        """The tokens in one layer's cache once the first `num_computed` of prompt and answer have run."""
        if num_computed >= self.prompt_len:
            return self.prompt_kv_lens[layer] + num_computed - self.prompt_len
        return int(self.keep_masks[layer][:num_computed].sum()) if self.keep_masks is not None else 0


class PlanRuntime:
    """One plan for one model, which makes the states of its requests."""

    def __init__(self, pruning: PruningConfig) -> None:
        self.pruning, self.depth = pruning, pruning.depth

    @property
    def cut_layers(self) -> tuple[int, ...]:
        """Layers that are cut, in order."""
        return self.pruning.compiled.cut_layers

    @property
    def signals(self) -> Mapping[int, frozenset[Signal]]:
        """The signals that methods need of each layer's attention."""
        return self.pruning.compiled.observed

    def request_state(
        self,
        inputs: Mapping[str, Any],
        device: torch.device | None = None,
        broadcast_indices: BroadcastIndices | None = None,
    ) -> RequestState:
        """The state of a request before it runs.

        inputs: its ids [1, tokens] and the media features that the adapter reads. device: where it will run; None if
        only counts are needed. broadcast_indices: where ranks run one model, makes them keep the same tokens.
        Raises: PlanError, PlanNotApplied.
        """
        layout, prompt_kv_lens = self.count(inputs)
        if min(prompt_kv_lens) == len(layout):
            return self.unpruned_state(len(layout))
        keep_masks = self._keep_masks(layout) if self.pruning.compiled.layout_only else None
        if keep_masks is not None:
            require_applied(prompt_kv_lens, [int(mask.sum()) for mask in keep_masks], "cache is to hold {} tokens")
        prefill = None
        if keep_masks is None and device is not None:
            prefill = self._prefill(layout, device, broadcast_indices)
        return RequestState(
            runtime=self,
            prompt_len=len(layout),
            prompt_kv_lens=prompt_kv_lens,
            keep_masks=keep_masks,
            prefill=prefill,
        )

    def unpruned_state(self, prompt_len: int) -> RequestState:
        """The state of a request of which every layer keeps the whole prompt, whatever the plan says."""
        return RequestState(
            runtime=self,
            prompt_len=prompt_len,
            prompt_kv_lens=(prompt_len,) * self.depth,
            keep_masks=(np.ones(prompt_len, bool),) * self.depth,
        )

    def count(self, inputs: Mapping[str, Any]) -> tuple[Layout, tuple[int, ...]]:
        """The layout of a prompt, and how many of its tokens each layer keeps.

        inputs: as `request_state` takes them.
        Raises: PlanError.
        """
        (layout,) = self.pruning.adapter.layouts(self.pruning.config, inputs)
        return layout, self.pruning.plan.tokens(layout, self.depth)

    def _keep_masks(self, layout: Layout) -> tuple[KeepMask, ...]:
        """The tokens that each layer keeps, selected by a prefill of tokens without features."""
        prefill = self._prefill(layout, torch.device("cpu"))
        hidden, mask, masks = torch.empty(1, len(layout), 0), np.ones(len(layout), bool), []
        for layer in range(self.depth):
            if layer in self.cut_layers:
                hidden = prefill.cut(layer, hidden)
                mask = np.zeros(len(layout), bool)
                mask[prefill.slots[0].numpy()] = True
            masks.append(mask)
        return tuple(masks)

    def _prefill(
        self, layout: Layout, device: torch.device, broadcast_indices: BroadcastIndices | None = None
    ) -> PruningState:
        return PruningState.start(
            self.pruning.compiled, [layout], len(layout), device, broadcast_indices=broadcast_indices
        )


class PlanCache:
    """The plans of a server's requests: its own, and those that requests override it with."""

    def __init__(self, pruning: PruningConfig, chunked_prefill: bool) -> None:
        self.default = PlanRuntime(pruning)
        self._chunked_prefill = chunked_prefill
        self._overrides = lru_cache(maxsize=64)(self._create)  # bounded, as clients choose the keys

    def get(self, plan_override: Any) -> PlanRuntime:
        """The plan of a request.

        plan_override: what the request sends in place of the server's plan; None if nothing.
        Raises: PlanError, UnsupportedPlan.
        """
        if plan_override is None:
            return self.default
        if not isinstance(plan_override, str):
            raise PlanError(
                f"a request's plan must be a string, got {plan_override!r}", "a preset, a recipe, or a plan's JSON"
            )
        return self._overrides(plan_override)

    def _create(self, plan_spec: str) -> PlanRuntime:
        return PlanRuntime(with_plan(self.default.pruning, plan_spec, self._chunked_prefill))
