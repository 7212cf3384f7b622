"""Drop tokens that the question attends to least, except those far in time from the most attended one."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fastav.method import Method, Signal, View
from fastav.methods._options import require_number
from fastav.methods._order import ranks


@dataclass(frozen=True, slots=True)
class Omnidrop(Method):
    """OmniDrop's deep layers: ranks by attention of the question, in favour of tokens that are far in time.

    Of n audio and video tokens, k = floor(drop n) are to be dropped. The 2k tokens with the lowest scores are
    candidates. The key chunk of a clip is that of its highest score; each candidate's score is raised by `diversity`
    times its distance in time from the key chunk, over the index of its clip's last chunk. The k lowest are dropped.
    The score of a token whose second is unknown is not raised.

    drop: the share that this step drops, which must equal the plan's for the paper's choice. chunk: length in seconds.

    Source: arXiv:2605.14458, algorithm 1, as quoted by a third-party reproduction. Differs: attention is that of the
    preceding layer, mean over heads (the paper does not specify it); chunks are `chunk` seconds of the clip, as
    Qwen2.5-Omni interleaves them.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.TEXT_QUERIES, Signal.SECONDS})
    drop: float | int = 0.2
    diversity: float | int = 0.2
    chunk: float | int = 2.0

    def __post_init__(self) -> None:
        require_number("drop", self.drop, 0, 1)
        require_number("diversity", self.diversity, 0, 1000)
        require_number("chunk", self.chunk, 1e-3, 1e6)

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the rank: first all other tokens, then candidates by their raised score."""
        attention = view[Signal.TEXT_QUERIES].double()  # beside distances, float32 would lose small differences
        media = view.modality > 0
        ranked = ranks(attention, media)
        n_dropped = (ranked.size.double() * self.drop + 1e-6).floor()
        candidate = media & (ranked.size - ranked.rank <= 2 * n_dropped)
        score = torch.where(candidate, attention + self.diversity * self._distance(view, attention, media), attention)
        order = ranks(score, torch.where(media, candidate, 2)).rank + torch.where(candidate, ranked.size, 0)
        return -torch.where(media, order, 0).float()

    def _distance(self, view: View, attention: Tensor, media: Tensor) -> Float[Tensor, "batch tokens"]:
        """Chunks from each token to its clip's key chunk, over the last chunk's index; 0 if a second is unknown."""
        chunk = torch.floor(view.second / self.chunk)
        ranked = ranks(attention, torch.where(media, view.item, -1))
        key = ranked.order.gather(1, ranked.order.argsort(dim=1) - ranked.rank)  # the first of each token's clip
        last = torch.floor(view.last_second / self.chunk).nan_to_num(nan=0.0).clamp(min=1)
        return ((chunk - chunk.gather(1, key)).abs().double() / last).nan_to_num(nan=0.0)
