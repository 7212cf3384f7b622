"""Every so-manieth token of each modality stays."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, View
from fastav.methods._order import ranks, spread


@dataclass(frozen=True, slots=True)
class Strided(Method):
    """Tokens spread evenly over each modality stay: a control that looks at nothing but order.

    A share of 1/2, 1/4 or 1/8 keeps exactly every 2nd, 4th or 8th token, counted among those still there; shares
    between are spread by a low-discrepancy (van der Corput) sequence, since a method does not know how many will stay.
    A pooled budget takes about the same share of every modality.
    """

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the radical inverse of the rank among the tokens of the same modality."""
        modality = view.modality
        return -spread(ranks(torch.zeros_like(modality), modality).rank)
