"""Keep tokens by scores that the caller passes."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, Signal, View


@dataclass(frozen=True, slots=True)
class Given(Method):
    """Your own scores of every prompt token: `fastav.prune(model, plan, scores=...)`."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.GIVEN})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """The caller's scores of the remaining tokens."""
        return view[Signal.GIVEN]
