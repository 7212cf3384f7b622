"""Keep the tokens that the question attends to most in the layer about to run."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, Signal, View


@dataclass(frozen=True, slots=True)
class OwnTextQueries(Method):
    """`text-queries` by the attention of the layer about to run: mean over queries of the text after the clip.

    Works before layer 0, too, at the cost of `own-last-query`. In a cache-only step it equals `text-queries`.

    Source: ours, from the scores of SEATS (arXiv:2605.20035: the layer) and OmniDrop (arXiv:2605.14458: the queries).
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.OWN_TEXT_QUERIES})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Mean attention of the question's queries."""
        return view[Signal.OWN_TEXT_QUERIES]
