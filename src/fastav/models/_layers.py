"""Layers that our own families share."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import SiglipVisionModel


class SiglipTower(nn.Module):
    """The first layers of SigLIP. Later ones, and the norm after them, are part of a checkpoint but not computed.

    depth: how many layers are computed; None: all.
    """

    def __init__(self, config: Any, depth: int | None = None) -> None:
        super().__init__()
        self.depth = depth
        self.vision_tower = nn.ModuleDict({"vision_model": SiglipVisionModel(config)})

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The layers that are computed."""
        siglip: Any = self.vision_tower["vision_model"]
        return list(siglip.encoder.layers)[: self.depth]

    def forward(self, pixels: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames patches channels"]:
        """Patches in row-major order."""
        siglip: Any = self.vision_tower["vision_model"]
        hidden = siglip.embeddings(pixels)
        for layer in self.layers:
            hidden = layer(hidden, None)
        return hidden


def mlp(channels: int, hidden: int, depth: int) -> nn.Sequential:
    """`depth` linear layers with GELUs between them."""
    layers: list[nn.Module] = [nn.Linear(channels, hidden)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*layers)
