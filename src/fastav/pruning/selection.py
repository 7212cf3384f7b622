"""Selection of the tokens with the highest scores, within the budgets of a cut.

This is the library's only top-k. Nothing here waits for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastav.errors import PlanError
from fastav.layout import Modality


class SelectionGroups(NamedTuple):
    """The groups of tokens that compete for the budgets of a cut.

    bias: added to scores; 0 for tokens that compete, +inf for tokens that are always kept, -inf for columns without a
    token. group: the index of a token's pool; the number of pools for a token in none; one more for columns without a
    token.
    """

    bias: Float[Tensor, "batch tokens"]
    group: Int[Tensor, "batch tokens"]

    @classmethod
    def of(
        cls, modality: Int[Tensor, "batch tokens"], pools: Sequence[frozenset[Modality]], *, last: int = -1
    ) -> "SelectionGroups":
        """The groups of tokens, by modality (-1: no token).  Tokens in the column `last` are always kept."""
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
    """The indices of the kept tokens, in prompt order and left-padded to `width`, and which of them are valid.

    Each pool in `counts` keeps its highest scores; of equal scores, the earlier token's. Tokens in no pool are kept,
    those of modality -1 are dropped, and the last token is always kept. `width` is the largest number of tokens that a
    row keeps, known from the layouts.

    Raises: PlanError if a score is NaN (checked on the CPU only: elsewhere the check would stall the device).
    """
    groups = SelectionGroups.of(modality, [pool for pool, _ in counts])
    no_limit = torch.full_like(modality[:, 0], modality.shape[1])
    limits = torch.stack([*(count for _, count in counts), no_limit, torch.zeros_like(no_limit)], dim=1)
    return select_grouped(scores, groups.bias, groups.group, limits, width)


def select_grouped(
    scores: Float[Tensor, "batch tokens"],
    bias: Float[Tensor, "batch tokens"],
    group: Int[Tensor, "batch tokens"],
    limits: Int[Tensor, "batch groups"],
    width: int,
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
    """`select`, from the fields of `SelectionGroups`.  limits: numbers of tokens to keep of each group."""
    order = _ranking(scores, bias)
    ranked_group = group.gather(1, order)
    groups = torch.arange(limits.shape[1], device=group.device)
    rank = (ranked_group[:, None] == groups[:, None]).cumsum(2).gather(1, ranked_group[:, None])[:, 0]
    # dropped tokens become -1, which sorts to the left
    kept = order.masked_fill(rank > limits.gather(1, ranked_group), -1)
    index = kept.sort(dim=1).values[:, order.shape[1] - width :]
    return index.clamp(min=0), index >= 0


def select_uniform(
    scores: Float[Tensor, "batch tokens"], bias: Float[Tensor, "batch tokens"], width: int
) -> Int[Tensor, "batch width"]:
    """`select` for one pool if every row keeps exactly `width` tokens, including those outside the pool.

    The result is the first `width` of the ranking, without counting groups on the device.
    """
    return _ranking(scores, bias)[:, :width].sort(dim=1).values


def _ranking(scores: Float[Tensor, "batch tokens"], bias: Float[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Indices from the highest score to the lowest; equal scores in prompt order."""
    if scores.device.type == "cpu" and bool(scores.isnan().any()):
        raise PlanError("a score is NaN", "check that the model's hidden states, or your own scores, are finite")
    return (scores + bias).argsort(dim=1, descending=True, stable=True)
