"""Keep the first tokens of each modality of each clip."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, View
from fastav.methods._order import ITEM_BITS, ranks


@dataclass(frozen=True, slots=True)
class KeepFirst(Method):
    """Keeps the first tokens of each modality of each clip in turn: a control that reads only the order of tokens.

    For one clip and one budget per modality it equals `position`; with a pooled budget every modality keeps its own
    beginning.
    """

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the rank among the remaining tokens of the same modality and item."""
        return -ranks(-view.position, (view.modality << ITEM_BITS) | (view.item + 1)).rank.float()
