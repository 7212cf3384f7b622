"""Tokens that are padding by construction go first."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, View


@dataclass(frozen=True, slots=True)
class Unpadded(Method):
    """Tokens that hold content stay; those that encode only padding go, latest first.

    Known from the layout alone, so it can cut before the first layer: of VideoLLaMA2's 1,496 audio tokens, 696 are
    silence that pads 16 s of sound to 30 s.
    """

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """One for content, zero for padding."""
        return (~view.padding).float()
