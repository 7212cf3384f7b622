"""The repetition penalty of the originals, which generate from embeddings: it does not apply to the prompt.

vLLM's model runners take logits processors with different interfaces, so there is a class for each. Both divide the
positive logits of generated tokens and multiply the negative ones.  Source: arXiv:1909.05858.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fastav.engines.vllm.compat import AdapterLogitsProcessor, LogitsProcessor, VLLMValidationError

PENALTY = "fastav_repetition_penalty"  # the key of a request's `extra_args` that holds its penalty


class _Penalty:
    """Takes a request's repetition penalty away from vLLM, whose own penalty applies to the prompt as well."""

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


class GeneratedPenaltyV1(_Penalty, AdapterLogitsProcessor):
    """Applies the penalty request by request, for model runner V1."""

    def is_argmax_invariant(self) -> bool:
        """False: a penalty can change the most likely token."""
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Tensor], Tensor] | None:
        """The function that changes the logits of one request; None if it has no penalty."""
        penalty = (params.extra_args or {}).get(PENALTY)
        return None if penalty is None else partial(_penalize, penalty)


def _penalize(penalty: float | int, generated: list[int], logits: Tensor) -> Tensor:
    """Logits [vocab] with generated tokens made less likely (below 1: more likely)."""
    ids = torch.tensor(sorted(set(generated)), dtype=torch.long, device=logits.device)
    values = logits[ids]
    return logits.index_copy(0, ids, torch.where(values < 0, values * penalty, values / penalty))


class GeneratedPenaltyV2(_Penalty, LogitsProcessor):
    """Applies the penalties of a batch at once, for model runner V2, without waiting for the device.

    req_states: vLLM's, with the ids of every request by slot.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._states = req_states
        self._is_penalized = np.zeros(req_states.max_num_reqs, bool)
        self._penalties = torch.ones(req_states.max_num_reqs, device=req_states.device)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Note the penalty of the request that takes a slot, and return whether it has one."""
        penalty = (sampling_params.extra_args or {}).get(PENALTY)
        self._penalties[req_idx] = 1.0 if penalty is None else penalty
        self._is_penalized[req_idx] = penalty is not None
        return penalty is not None

    def apply(self, logits: Float[Tensor, "rows vocab"], ctx: Any) -> Float[Tensor, "rows vocab"]:
        """Logits with generated tokens made less likely (below 1: more likely)."""
        if not self._is_penalized[ctx.idx_mapping_np].any():
            return logits
        slots = ctx.expanded_idx_mapping.long()
        ids = self._states.all_token_ids.gpu[slots].long()
        positions = torch.arange(ids.shape[1], device=ids.device)
        start, end = self._states.prompt_len.gpu[slots], self._states.total_len.gpu[slots]
        is_generated = (positions >= start[:, None]) & (positions < end[:, None])
        vocab = logits.shape[1]
        seen = torch.zeros(logits.shape[0], vocab + 1, dtype=torch.bool, device=logits.device)
        seen.scatter_(1, torch.where(is_generated, ids, vocab), True)  # the last column is of tokens to leave out
        penalties = self._penalties[slots][:, None]
        return torch.where(seen[:, :-1], torch.where(logits < 0, logits * penalties, logits / penalties), logits)
