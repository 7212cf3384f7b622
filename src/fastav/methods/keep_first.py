"""The first tokens of each modality stay."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastav.layout import Modality
from fastav.method import Method, View


@dataclass(frozen=True, slots=True)
class KeepFirst(Method):
    """The first tokens of each modality stay, turn about: a control that looks at nothing but order.

    With one budget per modality it equals `position`; with a pooled budget every modality keeps its own beginning.
    """

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the rank among the tokens of the same modality that are still there."""
        modality = view.modality
        rank = torch.zeros_like(modality, dtype=torch.float32)
        for m in Modality:
            member = modality == int(m)
            rank = torch.where(member, member.cumsum(1).float(), rank)
        return -rank
