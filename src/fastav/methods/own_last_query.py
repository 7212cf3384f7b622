"""Keep the tokens that the last query attends to most in the layer about to run."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, Signal, View


@dataclass(frozen=True, slots=True)
class OwnLastQuery(Method):
    """SEATS' score inside the decoder: attention of the last query in the layer about to run, mean over heads.

    Works before layer 0, too. The layer's norm and projections of queries, keys and values run once more, on the tokens
    that remain before the cut. In a cache-only step it equals `last-query`, which reads the same layer there.

    Source: arXiv:2605.20035. Differs: the number of tokens of each modality and of each window of time is the plan's.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.OWN_LAST_QUERY})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Attention of the last query."""
        return view[Signal.OWN_LAST_QUERY]
