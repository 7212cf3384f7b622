"""The earliest tokens of the prompt stay."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, View


@dataclass(frozen=True, slots=True)
class Position(Method):
    """The earliest tokens stay: the rule that FastAV reads off its rollout figure.

    After the middle layer rollout mass concentrates on early tokens, so the paper's tables cut by position: the first
    10 audio tokens, the first 4 frames, or what stands before position 750.

    Source: arXiv:2601.13143, section 3 (global pruning).
    """

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the position."""
        return -view.position.float()
