"""Keep the first tokens of each modality."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastav.layout import Modality
from fastav.method import Method, View


@dataclass(frozen=True, slots=True)
class KeepFirst(Method):
    """Keeps the first tokens of each modality in turn: a control that reads only the order of tokens.

    With one budget per modality it equals `position`; with a pooled budget every modality keeps its own beginning.
    """

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the rank among the remaining tokens of the same modality."""
        modality = view.modality
        rank = torch.zeros_like(modality, dtype=torch.float32)
        for m in Modality:
            member = modality == int(m)
            rank = torch.where(member, member.cumsum(1).float(), rank)
        return -rank
