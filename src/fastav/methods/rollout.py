"""Keep the tokens that contribute most to the last query, through all layers so far."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, Signal, View
from fastav.methods._options import require_flag


@dataclass(frozen=True, slots=True)
class Rollout(Method):
    """FastAV's global pruning by scores of the current prompt: the last query's row of the attention rollout.

    The paper derives a fixed rule from rollouts that it computes in advance (see `position`); here every prompt has its
    own, at the cost of computing the attention scores of the layers so far once more.

    lowest: keep the least informative tokens instead, which the paper's ablation calls removing the top informative.

    Source: arXiv:2601.13143, section 3; rollout by Abnar and Zuidema, arXiv:2005.00928, alpha 0.5 (not given there).
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ROLLOUT})
    lowest: bool = False

    def __post_init__(self) -> None:
        require_flag("lowest", self.lowest)

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """The last query's row of the rollout, or minus it."""
        return -view[Signal.ROLLOUT] if self.lowest else view[Signal.ROLLOUT]
