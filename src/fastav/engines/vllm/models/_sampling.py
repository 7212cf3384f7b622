"""The repetition penalty of the originals, which generate from embeddings: it does not apply to the prompt."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastav.engines.vllm.compat import AdapterLogitsProcessor, VLLMValidationError

PENALTY = "fastav_repetition_penalty"  # the key of a request's `extra_args` that holds its penalty


class GeneratedPenalty(AdapterLogitsProcessor):
    """Applies a request's repetition penalty in place of vLLM, whose own penalty applies to the prompt as well."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Move the penalty to `extra_args`, which vLLM does not read.

        Raises: VLLMValidationError if a client set an invalid penalty there itself.
        """
        penalty = (sampling_params.extra_args or {}).get(PENALTY, 1)
        if not (isinstance(penalty, int | float) and 0 < penalty < float("inf")):
            raise VLLMValidationError(f"{PENALTY} must be a number above 0, got {penalty!r}")
        if sampling_params.repetition_penalty != 1:
            sampling_params.extra_args = {
                **(sampling_params.extra_args or {}),
                PENALTY: sampling_params.repetition_penalty,
            }
            sampling_params.repetition_penalty = 1.0

    def is_argmax_invariant(self) -> bool:
        """False: a penalty can change the most likely token."""
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Tensor], Tensor] | None:
        """The function that changes the logits of one request; None if it has no penalty."""
        penalty = (params.extra_args or {}).get(PENALTY)
        return None if penalty is None else partial(_penalize, penalty)


def _penalize(penalty: float | int, generated: list[int], logits: Tensor) -> Tensor:
    """Logits [vocab] with generated tokens made less likely (below 1: more likely).  Source: arXiv:1909.05858."""
    ids = torch.tensor(sorted(set(generated)), dtype=torch.long, device=logits.device)
    values = logits[ids]
    return logits.index_copy(0, ids, torch.where(values < 0, values * penalty, values / penalty))
