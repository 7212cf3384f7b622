"""Tensor parallelism: each rank has some of the heads, and all ranks must drop the same tokens.

A mean over heads is the mean of what the ranks find among theirs, so of `MEANS` only rows of scores are sent. Of what
else methods ask, all heads are gathered. Where methods look at the layout alone nothing is sent.
"""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from fastav.method import Signal

MEANS = frozenset({Signal.LAST_QUERY, Signal.TEXT_QUERIES, Signal.WINDOW})  # signals that are means over heads


class Ranks:
    """Those that run a model together, each with as many of its heads.

    group: vLLM's of these ranks; None of one that runs alone.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group if group is not None and group.world_size > 1 else None

    @property
    def alone(self) -> bool:
        """Whether there is but one."""
        return self._group is None

    def mean(self, rows: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
        """Of what each rank found."""
        return rows if self._group is None else self._group.all_reduce(rows.contiguous()) / self._group.world_size

    def heads(self, mine: Float[Tensor, "tokens mine features"], total: int) -> Float[Tensor, "tokens total features"]:
        """All heads in their order.

        total: how many there are; where these are fewer than ranks, neighbouring ranks have the same one.
        """
        if self._group is None:
            return mine
        gathered = self._group.all_gather(mine.contiguous(), 1)
        return gathered[:, :: gathered.shape[1] // total]

    def agreed(self, chosen: Int[Tensor, "batch kept"]) -> Int[Tensor, "batch kept"]:
        """What the first rank chose, as the last bits of scores may differ."""
        return chosen if self._group is None else self._group.broadcast(chosen.contiguous(), 0)
