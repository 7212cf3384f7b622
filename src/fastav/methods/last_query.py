"""Keep the tokens that the last query attends to most."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, Signal, View
from fastav.methods._options import require_flag


@dataclass(frozen=True, slots=True)
class LastQuery(Method):
    """FastAV's fine pruning: drops what the last query of the preceding layer attends to least.

    lowest: keep the least attended tokens instead, which the paper's ablation calls removing the top attentive.

    Source: arXiv:2601.13143, section 3 (fine pruning): attention of the last query over the remaining tokens, averaged
    over heads. The row is computed from that layer's queries and keys, without an attention map.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.LAST_QUERY})
    lowest: bool = False

    def __post_init__(self) -> None:
        require_flag("lowest", self.lowest)

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Attention of the last query, or minus it."""
        return -view[Signal.LAST_QUERY] if self.lowest else view[Signal.LAST_QUERY]
