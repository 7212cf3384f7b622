"""Keep evenly spaced tokens of each modality."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, View
from fastav.methods._order import radical_inverse, ranks


@dataclass(frozen=True, slots=True)
class Strided(Method):
    """Keeps evenly spaced tokens of each modality: a control that reads only the order of tokens.

    A share of 1/2, 1/4 or 1/8 keeps exactly every 2nd, 4th or 8th of the remaining tokens; for other shares, tokens are
    spaced by a low-discrepancy (van der Corput) sequence, since a method does not know the budget. A pooled budget
    keeps about the same share of every modality.
    """

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the radical inverse of the rank among the tokens of the same modality."""
        modality = view.modality
        return -radical_inverse(ranks(torch.zeros_like(modality), modality).rank)
