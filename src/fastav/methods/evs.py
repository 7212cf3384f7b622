"""Keep tokens that differ from the previous frame."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastav.method import Method, Signal, View
from fastav.methods._order import earlier, rows_at, temporal_ranks


@dataclass(frozen=True, slots=True)
class Evs(Method):
    """Efficient Video Sampling: keeps tokens that differ from the same place in the previous frame.

    The score is one minus the cosine to the co-located token of the previous frame; the first frame is always kept. The
    layer's inputs are compared: at layer 0, as published, the encoders' outputs.

    Source: arXiv:2510.14624. Differs: audio, which the paper does not have, is compared from token to token.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.HIDDEN_STATES, Signal.FRAMES})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Cosine distance in time, in [0, 2]; 3 for tokens without an earlier one."""
        in_time = temporal_ranks(view)
        hidden = view.hidden.float()
        change = 1 - cosine_similarity(hidden, rows_at(hidden, earlier(in_time.order, 1)), dim=-1)
        return torch.where(in_time.rank == 0, 3.0, change)
