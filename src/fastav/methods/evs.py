"""What differs from the frame before stays."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastav.method import Method, Signal, View
from fastav.methods._order import courses, earlier, rows_at


@dataclass(frozen=True, slots=True)
class Evs(Method):
    """Efficient Video Sampling: tokens stay whose picture differs from the same place of the frame before.

    One minus the cosine to the co-located token of the previous frame; the first frame always stays. What the layer is
    entered with is compared: at layer 0, as published, what the encoders put into the prompt.

    Source: arXiv:2510.14624. Differs: audio, of which the paper has none, is compared from token to token.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.HIDDEN_STATES, Signal.FRAMES})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Cosine distance in time, in [0, 2]; 3 where there is nothing before."""
        course = courses(view)
        hidden = view.hidden.float()
        change = 1 - cosine_similarity(hidden, rows_at(hidden, earlier(course.order, 1)), dim=-1)
        return torch.where(course.rank == 0, 3.0, change)
