"""Keep the tokens that the prompt's last queries attend to, and their neighbours."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool1d

from fastav.errors import PlanError
from fastav.method import Method, Signal, View
from fastav.methods._options import require_integer


@dataclass(frozen=True, slots=True)
class Window(Method):
    """SnapKV's score: mean attention of the last 32 queries, averaged over `pool` neighbouring tokens.

    Source: arXiv:2404.14469, section 4. Differs: the paper cuts caches head by head, while here tokens have one score,
    the mean over heads, and neighbours are among the remaining tokens. Pools have 5 tokens, as in the paper's code; the
    paper has 7, and a maximum in place of the mean.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WINDOW})
    pool: int = 5

    def __post_init__(self) -> None:
        require_integer("pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise PlanError(f"pool must be odd, got {self.pool}", "the token itself is in the middle of its pool")

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Attention of the last queries, pooled with zeros beyond the prompt's ends."""
        attention = view[Signal.WINDOW].masked_fill(view.modality < 0, 0.0)
        pool = min(self.pool, 2 * attention.shape[1] + 1)  # a larger pool covers no more tokens
        return avg_pool1d(attention[:, None], pool, stride=1, padding=pool // 2)[:, 0]
