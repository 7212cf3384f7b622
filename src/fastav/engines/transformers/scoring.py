"""Teacher forcing: the logits that lead to each token of a given answer, by the decoding loop that answers use."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastav.adapter import Prepared
from fastav.decoding.settings import greedy_settings
from fastav.engines.transformers.generation.loop import Decoding
from fastav.engines.transformers.generation.sampler import TokenSource
from fastav.engines.transformers.hooks import prune
from fastav.engines.transformers.prefetch import on_device
from fastav.pruning.compiled import CompiledPlan


def forced_logits(
    model: Any, compiled: CompiledPlan, prepared: Prepared, answers: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "steps vocabulary"], ...]:
    """As `Engine.forced_logits`, for prompts that are prepared."""
    decoding = ForcedDecoding(compiled, answers)
    with prune(model, compiled, layouts=prepared.layouts):
        model.generate(
            **on_device(prepared.inputs, model),
            **greedy_settings(),
            max_new_tokens=1 + max(map(len, answers)),
            custom_generate=decoding,
        )
    return decoding.logits()


class ForcedDecoding(Decoding):
    """A decoding that takes the tokens of given answers, one answer per row, and records the logits before each."""

    def __init__(self, compiled: CompiledPlan, answers: Sequence[Sequence[int]]) -> None:
        super().__init__(compiled.adapter)
        self._answers = answers
        self._tokens: ForcedTokens | None = None

    def logits(self) -> tuple[Float[Tensor, "steps vocabulary"], ...]:
        """Of each row, the logits before each token of its answer and after the last, in host memory."""
        assert self._tokens is not None
        steps = self._tokens.logits
        return tuple(
            torch.stack([step[row] for step in steps[: len(answer) + 1]]) for row, answer in enumerate(self._answers)
        )

    def _start(self, input_ids: Int[Tensor, "batch prompt"], *_: Any, **__: Any) -> TokenSource:
        self._tokens = ForcedTokens(input_ids, self._answers)
        return self._tokens


class ForcedTokens(TokenSource):
    """The tokens of given answers, of which shorter ones are padded by token 0.  logits: those before each token."""

    def __init__(self, ids: Int[Tensor, "batch prompt"], answers: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, answers))
        padded = [[*answer, *[0] * (longest + 1 - len(answer))] for answer in answers]
        self.ids, self._steps = ids, torch.tensor(padded, dtype=torch.long, device=ids.device).T
        self.logits: list[Tensor] = []

    def take(self, logits: Float[Tensor, "batch vocabulary"]) -> Int[Tensor, " batch"]:
        """Record the logits, and return the next token of every row."""
        token = self._steps[len(self.logits)]
        self.logits.append(logits.to("cpu", copy=True))
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        return token

    @property
    def n_left(self) -> int:
        """The number of logits still to be recorded."""
        return len(self._steps) - len(self.logits)

    @property
    def done(self) -> bool:
        """Whether all logits are recorded."""
        return self.n_left == 0

    def output(self) -> Int[Tensor, "batch tokens"]:
        """The prompts and the answers."""
        return self.ids
