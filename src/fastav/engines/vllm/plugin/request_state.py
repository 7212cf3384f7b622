"""A request under a plan: how many tokens of its prompt every layer keeps, and which.

The counts follow from the layout before anything runs. So do the tokens themselves where methods read the layout
alone; where they read scores, a `PruningState` selects them while the prompt runs, as in the engine transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int

from fastav.engines.vllm import guards
from fastav.engines.vllm.guards import PruningConfig
from fastav.engines.vllm.plugin.late_schedule import LateSchedule
from fastav.errors import PlanError, UnsupportedPlan
from fastav.layout import Layout, Modality
from fastav.method import Signal
from fastav.pruning.device_layout import question_mask
from fastav.pruning.state import WINDOW, BroadcastIndices, PruningState
from fastav.pruning.verification import require_applied

KeepMask = Bool[np.ndarray, " tokens"]


class Chunking(NamedTuple):
    """How a server chunks prompts whose hidden states are held.

    token_budget: of a step. max_tokens: of a late step. max_withheld: the most tokens of a prompt that late steps may
    take the place of. reused_layer: the layer whose inputs prefix caching reuses, with the caches of all layers before
    it; None without.
    """

    token_budget: int
    max_tokens: int
    max_withheld: int
    reused_layer: int | None

    @classmethod
    def of(cls, token_budget: int, reused_layer: int | None) -> "Chunking":
        """For a server whose steps have at most `token_budget` tokens: late steps take half of them."""
        return cls(token_budget, max(1, token_budget // 2), max(1, token_budget // 4), reused_layer)


@dataclass(frozen=True, kw_only=True)
class RequestState:
    """One request.

    runtime: of its model and plan. prompt_len: tokens of its prompt. prompt_kv_lens: how many of them each layer keeps.
    keep_masks: which ones, of every layer before scores decide. prefill: selects the others, while the prompt runs.
    late: the schedule of a prompt that comes in chunks although scores decide; None if it cannot. withheld: the ids of
    the tokens that this schedule withholds from vLLM, the first one excepted. max_reused: how many tokens of the prompt
    may be taken from the prefix cache; None if the states that enter its first cut are not cached.
    """

    runtime: "PlanRuntime"
    prompt_len: int
    prompt_kv_lens: tuple[int, ...]
    keep_masks: tuple[KeepMask, ...]
    prefill: PruningState | None = None
    late: LateSchedule | None = None
    withheld: Int[np.ndarray, " withheld"] | None = None
    max_reused: int | None = None

    @property
    def is_unpruned(self) -> bool:
        """Whether every layer keeps the whole prompt."""
        return min(self.prompt_kv_lens) == self.prompt_len

    def comes_in_chunks(self, num_computed: int, num_tokens: int) -> bool:
        """Whether a step of `num_tokens` tokens is one of a late schedule, and not of an answer or the whole prompt.

        A prompt whose states are to be cached always has such steps.
        """
        is_whole = self.max_reused is None and not num_computed and num_tokens >= self.prompt_len
        return self.late is not None and num_computed < self.prompt_len and not is_whole

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
        if self.late is not None:
            if layer >= self.late.held_layer:
                return self.late.late_len(layer, num_computed)
            num_computed = self.late.num_early(num_computed)
        return int(self.keep_masks[layer][:num_computed].sum()) if layer < len(self.keep_masks) else 0


class PlanRuntime:
    """One plan for one model, which makes the states of its requests.

    chunking: of prompts whose tokens are selected by scores; None if these run at once.
    """

    def __init__(self, pruning: PruningConfig, chunking: Chunking | None = None) -> None:
        self.pruning, self.depth, self.chunking = pruning, pruning.depth, chunking

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
        keep_masks = self._keep_masks(layout, self._held_layer)
        kept = [int(mask.sum()) for mask in keep_masks]
        require_applied(prompt_kv_lens[: len(kept)], kept, "cache is to hold {} tokens")
        prefill = late = withheld = max_reused = None
        if len(keep_masks) < self.depth:
            late = self._late(layout, prompt_kv_lens, keep_masks)
            if late is not None and self._reuses:
                max_reused = self._max_reused(layout, late)
            if late is not None and device is not None:
                withheld = inputs["input_ids"][0][late.first_withheld + 1 :]
            prefill = None if device is None else self._prefill(layout, device, broadcast_indices)
        return RequestState(
            runtime=self,
            prompt_len=len(layout),
            prompt_kv_lens=prompt_kv_lens,
            keep_masks=keep_masks,
            prefill=prefill,
            late=late,
            withheld=withheld,
            max_reused=max_reused,
        )

    @property
    def _reuses(self) -> bool:
        """Whether the states that enter the first cut are those that the prefix cache has."""
        if self.chunking is None or self.needs_whole_prompts:
            return False
        return self.chunking.reused_layer == self.pruning.compiled.first_layer

    @property
    def _held_layer(self) -> int:
        compiled = self.pruning.compiled
        return compiled.first_layer if self._reuses else compiled.first_scored_layer

    def _max_reused(self, layout: Layout, late: LateSchedule) -> int:
        """Tokens before the first whose query scores others, and before those that are withheld.

        One more token must run, as vLLM admits no prompt without.
        """
        n_queries = {
            Signal.LAST_QUERY: 1,
            Signal.WINDOW: WINDOW,
            Signal.TEXT_QUERIES: int(question_mask(layout).sum()),
        }
        signals = self.signals.get(late.held_layer - 1, ())
        queried = len(layout) - max((n for signal, n in n_queries.items() if signal in signals), default=0)
        return max(0, min(queried, late.first_withheld - 1))

    @cached_property
    def needs_whole_prompts(self) -> bool:
        """Whether no prompt that is pruned can come in chunks, on a server that chunks others."""
        return self.chunking is not None and guards.needs_whole_prompts(self.pruning) is not None

    def require_room(self, prompt_len: int, prompt_kv_lens: Sequence[int]) -> None:
        """Refuse a prompt that does not fit into a step, if it cannot come in chunks.

        prompt_kv_lens: how many of its tokens each layer keeps.
        Raises: UnsupportedPlan.
        """
        if self.chunking is None or not self.needs_whole_prompts or min(prompt_kv_lens) == prompt_len:
            return
        if prompt_len > self.chunking.token_budget:
            raise UnsupportedPlan(
                f"{guards.needs_whole_prompts(self.pruning)}; this prompt has {prompt_len} tokens, and a step "
                f"{self.chunking.token_budget}",
                "name another plan, or start the server with --no-enable-chunked-prefill",
            )

    def _late(
        self, layout: Layout, prompt_kv_lens: tuple[int, ...], keep_masks: tuple[KeepMask, ...]
    ) -> LateSchedule | None:
        """The schedule of a prompt in chunks."""
        if self.chunking is None or self.needs_whole_prompts:
            return None
        held_layer, n_tokens = len(keep_masks), len(layout)
        entering = keep_masks[-1] if keep_masks else np.ones(n_tokens, bool)
        is_text = layout.modality == Modality.TEXT  # the only tokens whose embeddings follow from their ids
        n_text = int(np.cumprod(is_text[::-1]).sum())
        return LateSchedule.of(
            np.concatenate([np.zeros(1, np.int64), np.cumsum(entering)]),
            prompt_kv_lens,
            [layer for layer in self.cut_layers if layer >= held_layer],
            max_tokens=self.chunking.max_tokens,
            max_steps=max(1, min(n_text, self.chunking.max_withheld)),
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

    def _keep_masks(self, layout: Layout, end_layer: int) -> tuple[KeepMask, ...]:
        """The tokens that each layer before `end_layer` keeps, selected by a prefill of tokens without features."""
        prefill = self._prefill(layout, torch.device("cpu"))
        hidden, mask, masks = torch.empty(1, len(layout), 0), np.ones(len(layout), bool), list[KeepMask]()
        for layer in range(end_layer):
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

    def __init__(self, pruning: PruningConfig, chunking: Chunking | None = None) -> None:
        self.default = PlanRuntime(pruning, chunking)
        self.chunking = chunking
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
        return PlanRuntime(guards.with_plan(self.default.pruning, plan_spec), self.chunking)
