"""Tokens that are far from each other stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fastav.method import Method, Signal, View
from fastav.methods._options import require_whole
from fastav.methods._order import rows_at

_BLOCK = 256  # tokens whose distances to all others are held at once
_FARTHEST = 2.0  # of cosine distances


@dataclass(frozen=True, slots=True)
class Divprune(Method):
    """DivPrune: the largest minimum cosine distance among what stays, by greedy choice, whose order is the score.

    First the token whose nearest neighbour is farthest; then, again and again, the one farthest from all chosen. Only
    tokens of one modality are compared, so that budgets by modality choose as if the others were not there; in a pooled
    budget the farther token goes first, whatever it is.

    limit: how many choices are made (None: all); the rest is ranked by its distance to the chosen. Choices beyond what
    stays are in vain, and a method does not know how many stay. Cost: n^2 d for the first choice, n d and a dozen small
    kernels for every other; memory that of the hidden states in float32.

    Source: arXiv:2503.02175 (there for image tokens before the first layer).
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.HIDDEN_STATES})
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            require_whole("limit", self.limit, 1)

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the turn at which a token is chosen."""
        modality = view.modality
        hidden = normalize(view.hidden.float(), dim=-1)
        batch, tokens = modality.shape
        # a modality's first choice comes before any later one of another
        far = _nearest(hidden, modality) + 2 * _FARTHEST
        far = far.masked_fill(modality < 0, -1.0)
        turn = torch.full((batch, tokens), tokens, dtype=torch.long, device=modality.device)
        steps = tokens if self.limit is None else min(tokens, self.limit)
        for step in range(steps):
            chosen = far.masked_fill(turn < tokens, -2.0).argmax(1, keepdim=True)
            turn.scatter_(1, chosen, step)
            distance = 1 - (hidden @ rows_at(hidden, chosen).transpose(1, 2))[..., 0]
            far = torch.where(modality == modality.gather(1, chosen), far.minimum(distance), far)
        later = far.masked_fill(turn < tokens, -2.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return -torch.where(turn < tokens, turn, steps + later).float()


def _nearest(hidden: Float[Tensor, "batch tokens features"], modality: Tensor) -> Float[Tensor, "batch tokens"]:
    """Cosine distance to the nearest other token of the same modality; the farthest there is if there is none."""
    blocks, tokens = [], hidden.shape[1]
    for first in range(0, tokens, _BLOCK):
        rows = slice(first, first + _BLOCK)
        distance = 1 - hidden[:, rows] @ hidden.transpose(1, 2)
        other = modality[:, rows, None] != modality[:, None]
        other |= torch.ones_like(other[0]).tril(first).triu(first)
        blocks.append(distance.masked_fill(other, _FARTHEST).amin(-1))
    return torch.cat(blocks, dim=1)
