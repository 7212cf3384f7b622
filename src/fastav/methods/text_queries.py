"""The tokens that the question attends to most stay."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, Signal, View


@dataclass(frozen=True, slots=True)
class TextQueries(Method):
    """Attention of the whole question, not of its last token alone: mean over the queries of the text behind the clip.

    Source: the score of OmniDrop (arXiv:2605.14458), as digests give it: mean over text queries of the attention to a
    token. Without its temporal re-ranking.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.TEXT_QUERIES})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Mean attention of the question's queries."""
        return view[Signal.TEXT_QUERIES]
