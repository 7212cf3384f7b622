"""Layers that models share."""

from torch import nn


def mlp(channels: int, hidden: int, depth: int) -> nn.Sequential:
    """`depth` linear layers with GELUs between them."""
    layers: list[nn.Module] = [nn.Linear(channels, hidden)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*layers)
