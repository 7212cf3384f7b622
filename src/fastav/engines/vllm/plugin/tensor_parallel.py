"""Tensor parallelism: each rank has some of the heads, and all ranks must drop the same tokens.

A mean over heads is the mean of the ranks' means, so `ATTENTION_SIGNALS` are reduced as one row of scores. For
other signals all heads are gathered. Where methods read the layout alone nothing is sent.
"""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor


class TensorParallel:
    """The ranks that run a model together, each with as many of its heads.

    group: vLLM's tensor-parallel group; None for a single rank.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group if group is not None and group.world_size > 1 else None

    @property
    def is_single(self) -> bool:
        """Whether there is only one rank."""
        return self._group is None

    def mean(self, rows: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
        """The mean over ranks."""
        return rows if self._group is None else self._group.all_reduce(rows.contiguous()) / self._group.world_size

    def gather_heads(
        self, local: Float[Tensor, "tokens local features"], total: int
    ) -> Float[Tensor, "tokens total features"]:
        """The heads of all ranks, in order.

        total: the number of heads; where these are fewer than ranks, neighbouring ranks have the same one.
        """
        if self._group is None:
            return local
        gathered = self._group.all_gather(local.contiguous(), 1)
        return gathered[:, :: gathered.shape[1] // total]

    def broadcast_indices(self, indices: Int[Tensor, "batch kept"]) -> Int[Tensor, "batch kept"]:
        """The first rank's indices: ranks could select different ones, as the last bits of scores may differ."""
        return indices if self._group is None else self._group.broadcast(indices.contiguous(), 0)
