"""Keep the earliest tokens of each clip."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, View
from fastav.methods._order import ITEM_BITS, ranks


@dataclass(frozen=True, slots=True)
class Position(Method):
    """Keeps the earliest tokens: the rule that FastAV derives from its rollout figure.

    After the middle layer the rollout concentrates on early tokens, so the paper's tables cut by position: they keep
    the first 10 audio tokens, the first 4 frames, or the tokens before position 750.

    If a prompt has several clips, sounds or images, which the paper does not treat, each keeps its own beginning: they
    share a budget in proportion to their remaining tokens. Text counts to the item before it.

    Source: arXiv:2601.13143, section 3 (global pruning).
    """

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the share of the item's tokens, among those with the same budget, that come before."""
        item = view.item.cummax(1).values.clamp(min=0)
        ranked = ranks(-view.position, (view.pool << ITEM_BITS) | item)
        return -(ranked.rank / ranked.size)
