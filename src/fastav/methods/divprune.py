"""Keep tokens that are far from each other."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from fastav.method import Method, Signal, View
from fastav.methods._options import require_integer
from fastav.methods._order import rows_at
from fastav.transfer import upload

_BLOCK = 256  # tokens whose distances to all others are in memory at once
_SAME = 1e-5  # distance that the rounding of float32 leaves between equal tokens
_MAX_DISTANCE = 2.0  # of cosine distances


@dataclass(frozen=True, slots=True)
class Divprune(Method):
    """DivPrune: maximises the minimum cosine distance among the kept tokens, greedily; the order is the score.

    The first choice is the token whose nearest neighbour is farthest; each further choice is the token that is farthest
    from all chosen ones. Only tokens of the same modality are compared, so that a budget by modality does not depend on
    other modalities; in a pooled budget the farther token is chosen first, whatever its modality.

    limit: number of choices (None: as many as the budgets keep); the remaining tokens are ranked by their distance to
    the chosen ones. Cost: n^2 d for the first choice, n d and about a dozen small kernels for every further one; memory
    of the hidden states in float32.

    Source: arXiv:2503.02175 (for image tokens before the first layer).
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.HIDDEN_STATES})
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            require_integer("limit", self.limit, 1)

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the step at which a token is chosen."""
        modality = view.modality
        hidden = normalize(view.hidden.float(), dim=-1)
        batch, tokens = modality.shape
        # the first choice of every modality comes before any second one
        distance = _nearest(hidden, modality) + 2 * _MAX_DISTANCE
        distance = distance.masked_fill(modality < 0, -1.0)
        chosen_at = torch.full((batch, tokens), tokens, dtype=torch.long, device=modality.device)
        quota, pool = _quota(view), view.pool
        steps = min(tokens, self.limit or tokens, tokens if view.kept is None else sum(view.kept.values()))
        for step in range(steps):
            is_open = chosen_at == tokens
            is_open = is_open if quota is None else is_open & (quota.gather(1, pool) > 0)
            index = distance.masked_fill(~is_open, -2.0).argmax(1, keepdim=True)
            chosen_at.scatter_(1, index, torch.where(is_open.gather(1, index), step, chosen_at.gather(1, index)))
            if quota is not None:
                quota.scatter_add_(1, pool.gather(1, index), torch.full_like(index, -1))
            to_chosen = _exact(1 - (hidden @ rows_at(hidden, index).transpose(1, 2))[..., 0])
            distance = torch.where(modality == modality.gather(1, index), distance.minimum(to_chosen), distance)
        remaining = distance.masked_fill(chosen_at < tokens, -2.0)
        rank = remaining.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return -torch.where(chosen_at < tokens, chosen_at, steps + rank).float()


def _quota(view: View) -> Int[Tensor, "batch budgets"] | None:
    """How many choices each budget has, none for tokens outside of budgets; None if budgets are unknown."""
    if view.kept is None:
        return None
    limits = upload(np.array([*view.kept.values(), 0, 0]), view.slots.device)
    return limits.repeat(len(view.slots), 1)


def _exact(distance: Tensor) -> Tensor:
    """Distances without what rounding leaves between equal tokens, so that these go in order on every device."""
    return distance.masked_fill(distance < _SAME, 0.0)


def _nearest(hidden: Float[Tensor, "batch tokens features"], modality: Tensor) -> Float[Tensor, "batch tokens"]:
    """Cosine distance to the nearest other token of the same modality; the maximum distance if there is none."""
    blocks: list[Tensor] = []
    for first in range(0, hidden.shape[1], _BLOCK):
        rows = slice(first, first + _BLOCK)
        distance = _exact(1 - hidden[:, rows] @ hidden.transpose(1, 2))
        excluded = modality[:, rows, None] != modality[:, None]
        excluded |= torch.ones_like(excluded[0]).tril(first).triu(first)
        blocks.append(distance.masked_fill(excluded, _MAX_DISTANCE).amin(-1))
    return torch.cat(blocks, dim=1)
