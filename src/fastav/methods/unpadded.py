"""Drop tokens that are padding by construction first."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, View


@dataclass(frozen=True, slots=True)
class Unpadded(Method):
    """Keeps tokens with content, and drops those that encode only padding, the latest first.

    The layout alone gives the padding, so a cut before the first layer is possible: of VideoLLaMA2's 1,496 audio
    tokens, 696 are silence that pads 16 s of sound to 30 s.
    """

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """One for content, zero for padding."""
        return (~view.padding).float()
