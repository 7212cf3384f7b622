"""The tokens stay that the prompt's last queries attend to, with their neighbours."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool1d

from fastav.errors import PlanError
from fastav.method import Method, Signal, View
from fastav.methods._options import require_whole


@dataclass(frozen=True, slots=True)
class Window(Method):
    """SnapKV's score: mean attention of the last 32 queries, averaged over `pool` neighbouring tokens.

    Source: arXiv:2404.14469, section 4. Differs: it cuts caches, head by head; here one score, mean over heads, serves
    for tokens, and neighbours are those still there. Pools of 5 as in its code, where the paper names 7 and a maximum.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WINDOW})
    pool: int = 5

    def __post_init__(self) -> None:
        require_whole("pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise PlanError(f"pool must be odd, got {self.pool}", "a pool has the token itself in its middle")

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Attention of the last queries, pooled; beyond the prompt's ends there is none."""
        attention = view[Signal.WINDOW].masked_fill(view.modality < 0, 0.0)
        pool = min(self.pool, 2 * attention.shape[1] + 1)  # all that there is, from either end
        return avg_pool1d(attention[:, None], pool, stride=1, padding=pool // 2)[:, 0]
