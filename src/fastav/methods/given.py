"""The caller's own scores decide."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, Signal, View


@dataclass(frozen=True, slots=True)
class Given(Method):
    """Scores of every prompt token, brought along by the caller: `fastav.prune(model, plan, scores=...)`."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.GIVEN})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """The given scores of the tokens still there."""
        return view[Signal.GIVEN]
