"""A scored prefill in chunks: which tokens run through which layers in which step.

The layers before the first cut that reads scores (the held layer) run chunk by chunk. The hidden states that enter the
held layer are held until the prompt's last token has run there, since its query scores them all. Then the late layers
run over the tokens that remain, in slices. The budget of tokens in a step bounds slices too, so a long prompt needs
several late steps.

vLLM's scheduler counts the tokens of a prompt and nothing else. So the last tokens of the prompt, one per late step,
are withheld from it: they run through the early layers together with the last chunk, and when the scheduler schedules
them, late slices run in their place. Counts follow from the layout, so scheduler and workers derive the same schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Stage(NamedTuple):
    """Late layers between two cuts.  first_layer, end_layer: from and to before. num_tokens: those that remain."""

    first_layer: int
    end_layer: int
    num_tokens: int


class Slice(NamedTuple):
    """Tokens that run through a stage's layers in one step: from `start` to before `end` of those that remain."""

    stage: int
    start: int
    end: int


def late_steps(stages: Sequence[Stage], max_tokens: int, max_steps: int) -> tuple[tuple[Slice, ...], ...]:
    """The slices of every late step, in the order in which they run.

    A step costs at most what `max_tokens` tokens cost in all late layers, and more only where `max_steps` would not
    suffice otherwise. No slice has more tokens than `max_tokens`, or than its share of such a longer step.
    """
    n_layers = stages[-1].end_layer - stages[0].first_layer
    total = sum((stage.end_layer - stage.first_layer) * stage.num_tokens for stage in stages)
    budget = max(max_tokens * n_layers, -(-total // max_steps))
    while len(steps := _pack(stages, max(max_tokens, -(-budget // n_layers)), budget)) > max_steps:
        budget += n_layers  # slices end between tokens, so that steps are not filled to the last layer
    return steps


def _pack(stages: Sequence[Stage], max_tokens: int, budget: int) -> tuple[tuple[Slice, ...], ...]:
    """Fill steps of `budget` tokens times layers with slices of at most `max_tokens` tokens."""
    steps, room = [list[Slice]()], budget
    for index, stage in enumerate(stages):
        n_layers, start = stage.end_layer - stage.first_layer, 0
        while start < stage.num_tokens:
            tokens = min(stage.num_tokens - start, max_tokens, room // n_layers)
            if not tokens:
                steps.append([])
                room = budget
                continue
            steps[-1].append(Slice(index, start, start + tokens))
            start, room = start + tokens, room - tokens * n_layers
    return tuple(map(tuple, steps))


@dataclass(frozen=True, kw_only=True)
class LateSchedule:
    """The schedule of one prompt that comes in chunks.

    prompt_len: its tokens. held_lens: how many of its first n tokens enter the held layer, for every n from 0.
    stages: of the late layers. steps: slices of every late step.
    """

    prompt_len: int
    held_lens: Int[np.ndarray, " counts"]
    stages: tuple[Stage, ...]
    steps: tuple[tuple[Slice, ...], ...]

    @classmethod
    def of(
        cls,
        held_lens: Int[np.ndarray, " counts"],
        prompt_kv_lens: Sequence[int],
        cut_layers: Sequence[int],
        *,
        max_tokens: int,
        max_steps: int,
    ) -> "LateSchedule":
        """The schedule for a prompt.

        prompt_kv_lens: how many of its tokens each layer keeps. cut_layers: the held layer, and cuts of later layers.
        max_tokens: in a slice. max_steps: tokens that the prompt can withhold.
        """
        stages = tuple(
            Stage(first, end, prompt_kv_lens[first]) for first, end in pairwise([*cut_layers, len(prompt_kv_lens)])
        )
        steps = late_steps(stages, max_tokens, max_steps)
        return cls(prompt_len=len(held_lens) - 1, held_lens=held_lens, stages=stages, steps=steps)

    @property
    def held_layer(self) -> int:
        """The layer whose inputs are held."""
        return self.stages[0].first_layer

    @property
    def first_withheld(self) -> int:
        """Index of the first withheld token: its step runs the last chunk and the first late step."""
        return self.prompt_len - len(self.steps)

    def num_early(self, num_computed: int) -> int:
        """Tokens that have run in the early layers, when vLLM counts `num_computed`."""
        return num_computed if num_computed <= self.first_withheld else self.prompt_len

    def num_late_steps(self, num_computed: int) -> int:
        """Late steps that have run, when vLLM counts `num_computed`."""
        return max(0, min(num_computed - self.first_withheld, len(self.steps)))

    def slices(self, num_computed: int, num_tokens: int) -> list[Slice]:
        """The slices that run in a step of `num_tokens` tokens."""
        first, end = self.num_late_steps(num_computed), self.num_late_steps(num_computed + num_tokens)
        return [one for step in self.steps[first:end] for one in step]

    def late_len(self, layer: int, num_computed: int) -> int:
        """Tokens in a late layer's cache, when vLLM counts `num_computed`, at most the prompt's."""
        return int(self._late_lens[self.num_late_steps(num_computed), layer - self.held_layer])

    @cached_property
    def _late_lens(self) -> Int[np.ndarray, "steps layers"]:
        lens = np.zeros((len(self.steps) + 1, self.stages[-1].end_layer - self.held_layer), np.int64)
        for index, step in enumerate(self.steps):
            lens[index + 1] = lens[index]
            for one in step:
                stage = self.stages[one.stage]
                lens[index + 1, stage.first_layer - self.held_layer : stage.end_layer - self.held_layer] = one.end
        return lens

    def limit(self, num_computed: int, num_tokens: int, *, late: bool) -> int:
        """How many tokens to schedule, of `num_tokens` for which there is room; 0 if the prompt must wait.

        The last chunk is scheduled where the withheld tokens have room beside it, and each late step has a step of its
        own. No step goes beyond the prompt. late: whether a late step may run.
        """
        if num_computed > self.first_withheld:
            return int(late)
        if late and num_tokens >= self.prompt_len - num_computed:
            return self.first_withheld + 1 - num_computed
        return min(num_tokens, self.first_withheld - num_computed)

    @property
    def buffer_len(self) -> int:
        """Tokens whose states are held between late steps."""
        return self.stages[0].num_tokens if len(self.steps) > 1 else 0

    def num_prompt_blocks(self, num_computed: int, block_size: int) -> int:
        """Blocks for what enters the held layer, in a step of the prompt at whose end vLLM counts `num_computed`."""
        return max(1, -(-int(self.held_lens[self.num_early(num_computed)]) // block_size))

    def num_buffer_blocks(self, num_computed: int, block_size: int) -> int:
        """Blocks for what is held between late steps, in such a step."""
        return -(-self.buffer_len // block_size) if num_computed > self.first_withheld else 0
