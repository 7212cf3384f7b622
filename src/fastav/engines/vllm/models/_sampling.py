"""How the originals penalize repetition: they generate from embeddings, so that their penalty sees no prompt."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor  # pyright: ignore[reportMissingImports]

OURS = "fastav_repetition_penalty"  # where a request's penalty is kept


class GeneratedPenalty(AdapterLogitsProcessor):
    """Takes the repetition penalty of a request over from vLLM, whose own sees the prompt as well."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Move the penalty to where vLLM does not look.

        Raises: VLLMValidationError if what a client put there itself is no penalty.
        """
        kept = (sampling_params.extra_args or {}).get(OURS, 1)
        if not (isinstance(kept, int | float) and 0 < kept < float("inf")):
            raise VLLMValidationError(f"{OURS} must be a number above 0, got {kept!r}")
        if sampling_params.repetition_penalty != 1:
            sampling_params.extra_args = {
                **(sampling_params.extra_args or {}),
                OURS: sampling_params.repetition_penalty,
            }
            sampling_params.repetition_penalty = 1.0

    def is_argmax_invariant(self) -> bool:
        """It changes which token is likeliest."""
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Tensor], Tensor] | None:
        """What changes the logits of one request."""
        penalty = (params.extra_args or {}).get(OURS)
        return None if penalty is None else partial(_penalized, penalty)


def _penalized(penalty: float | int, generated: list[int], logits: Tensor) -> Tensor:
    """Logits [vocab] in which tokens that were generated are less likely (more, below 1).  Source: arXiv:1909.05858."""
    seen = torch.tensor(sorted(set(generated)), dtype=torch.long, device=logits.device)
    of_seen = logits[seen]
    return logits.index_copy(0, seen, torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty))
