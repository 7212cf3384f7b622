"""Keep the earliest tokens of the prompt."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, View


@dataclass(frozen=True, slots=True)
class Position(Method):
    """Keeps the earliest tokens: the rule that FastAV derives from its rollout figure.

    After the middle layer the rollout concentrates on early tokens, so the paper's tables cut by position: they keep
    the first 10 audio tokens, the first 4 frames, or the tokens before position 750.

    Source: arXiv:2601.13143, section 3 (global pruning).
    """

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the position."""
        return -view.position.float()
