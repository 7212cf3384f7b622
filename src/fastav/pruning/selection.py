"""Picking the tokens with the highest scores, within the budgets of a cut.

The only top-k of the library is here. Nothing here waits for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastav.errors import PlanError
from fastav.layout import Modality


class SelectionGroups(NamedTuple):
    """Which tokens compete for which budget of a cut.

    bias: added to scores; 0 for tokens that compete, +inf for those that stay whatever their score, -inf where there is
    no token. group: the index of a token's pool; the number of pools for a token in none; one more where there is no
    token.
    """

    bias: Float[Tensor, "batch tokens"]
    group: Int[Tensor, "batch tokens"]

    @classmethod
    def of(
        cls, modality: Int[Tensor, "batch tokens"], pools: Sequence[frozenset[Modality]], *, last: int = -1
    ) -> "SelectionGroups":
        """The groups of tokens by modality (-1: no token).  The tokens in column `last` always stay."""
        group = torch.full_like(modality, len(pools), dtype=torch.long)
        for number, pool in enumerate(pools):
            for m in pool:
                group.masked_fill_(modality == int(m), number)
        group.masked_fill_(modality < 0, len(pools) + 1)
        bias = torch.zeros(group.shape, device=group.device)
        bias.masked_fill_(group == len(pools), torch.inf).masked_fill_(group > len(pools), -torch.inf)
        bias[:, last].fill_(torch.inf)
        return cls(bias, group)


def select(
    scores: Float[Tensor, "batch tokens"],
    modality: Int[Tensor, "batch tokens"],
    counts: Sequence[tuple[frozenset[Modality], Int[Tensor, " batch"]]],
    width: int,
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
    """The indices that stay, in prompt order and left-padded to `width`, and which of them are real.

    The highest scores of each pool in `counts` stay; of equal scores the earlier token stays. Tokens in no pool stay,
    those of modality -1 go, and the last token always stays. `width` is the largest number of tokens that a row keeps,
    known from the layouts.

    Raises: PlanError if a score is NaN (checked on the CPU only: elsewhere the check would stall the device).
    """
    groups = SelectionGroups.of(modality, [pool for pool, _ in counts])
    everything = torch.full_like(modality[:, 0], modality.shape[1])
    limits = torch.stack([*(count for _, count in counts), everything, torch.zeros_like(everything)], dim=1)
    return select_of(scores, groups.bias, groups.group, limits, width)


def select_of(
    scores: Float[Tensor, "batch tokens"],
    bias: Float[Tensor, "batch tokens"],
    group: Int[Tensor, "batch tokens"],
    limits: Int[Tensor, "batch groups"],
    width: int,
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
    """`select` with the fields of `SelectionGroups`.  limits: how many tokens of each group stay."""
    order = _ranking(scores, bias)
    ranked = group.gather(1, order)
    groups = torch.arange(limits.shape[1], device=group.device)
    rank = (ranked[:, None] == groups[:, None]).cumsum(2).gather(1, ranked[:, None])[:, 0]
    # what goes becomes -1, which sorts to the left
    index = order.masked_fill(rank > limits.gather(1, ranked), -1).sort(dim=1).values[:, order.shape[1] - width :]
    return index.clamp(min=0), index >= 0


def select_uniform(
    scores: Float[Tensor, "batch tokens"], bias: Float[Tensor, "batch tokens"], width: int
) -> Int[Tensor, "batch width"]:
    """`select` for one pool, where every row keeps exactly `width` tokens, those outside the pool included.

    Then the first `width` of the ranking are the answer, and no group has to be counted on the device.
    """
    return _ranking(scores, bias)[:, :width].sort(dim=1).values


def _ranking(scores: Float[Tensor, "batch tokens"], bias: Float[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Indices from the highest score to the lowest, equal ones in their order."""
    if scores.device.type == "cpu" and bool(scores.isnan().any()):
        raise PlanError("a score is NaN", "the model's hidden states or the given scores are not finite")
    return (scores + bias).argsort(dim=1, descending=True, stable=True)
