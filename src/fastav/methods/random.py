"""Keep tokens at random, by a seed."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastav.errors import PlanError
from fastav.method import Method, View


@dataclass(frozen=True, slots=True)
class Random(Method):
    """A uniform score for every token: the control that any method must beat.

    The score is a counter-based hash of seed, layer and position, so that the same seed gives the same choice on every
    device, alone or in a batch. All prompts of a run share the seed: change it from clip to clip if that matters.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_seed(self.seed):
            raise PlanError(f"seed must be a whole number in [0, 2**31), got {self.seed!r}")

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Uniform in [0, 1)."""
        start = torch.full_like(view.position, self.seed, dtype=torch.int64)
        mixed = _mix(_mix(_mix(start) + view.layer) + view.position)
        return mixed.float() / 2**31


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _mix(x: Tensor) -> Tensor:
    """A bijective scrambling of 31-bit integers (xor-shift and odd multipliers), in 64-bit arithmetic."""
    x = x + 0x1E3779B9 & 0x7FFFFFFF
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (13, 0x297A2D39)):
        x = ((x ^ (x >> shift)) * factor) & 0x7FFFFFFF
    return x ^ (x >> 16)
