"""Keep the tokens that the question attends to most."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, Signal, View


@dataclass(frozen=True, slots=True)
class TextQueries(Method):
    """Keeps what the entire question attends to, not only its last token: mean over queries of the text after the clip.

    Source: the score of OmniDrop (arXiv:2605.14458), as digests describe it: mean over text queries of the attention to
    a token. Differs: without its temporal re-ranking.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.TEXT_QUERIES})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Mean attention of the question's queries."""
        return view[Signal.TEXT_QUERIES]
