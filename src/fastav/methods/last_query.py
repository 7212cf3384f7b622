"""The tokens that the last query attends to most stay."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, Signal, View


@dataclass(frozen=True, slots=True)
class LastQuery(Method):
    """FastAV's fine pruning: what the last query of the layer before attends to least goes.

    Source: arXiv:2601.13143, section 3 (fine pruning): attention of the last query over the remaining tokens, averaged
    over heads. The row is computed from that layer's own queries and keys, so no attention map is needed.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.LAST_QUERY})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Attention of the last query."""
        return view[Signal.LAST_QUERY]
