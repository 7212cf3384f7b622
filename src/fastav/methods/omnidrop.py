"""What the question attends to least goes, unless it is far from where the question looks."""

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
    """OmniDrop's deep layers: attention of the question, re-ranked in favour of what is far in time.

    Of the n audio and video tokens, k = floor(drop n) are to go. The 2k with the lowest scores are candidates; to the
    score of each is added `diversity` times its distance in time from the key chunk, that of the highest score, over
    the index of the prompt's last chunk; the k lowest go. A token whose second is unknown gets nothing added.

    drop: the share that this step drops, which must be the plan's for the choice to be the paper's. chunk: seconds.

    Source: arXiv:2605.14458, algorithm 1, as a third-party reproduction quotes it. Differs: attention is that of the
    layer before, mean over heads (the paper does not say); chunks are `chunk` seconds of the clip, as Qwen2.5-Omni
    interleaves them.
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
        """Minus the place in the order of what stays: other tokens, then candidates by the score in time."""
        attention = view[Signal.TEXT_QUERIES]
        media = view.modality > 0
        place = ranks(attention, media)
        going = (place.size.double() * self.drop + 1e-6).floor()
        candidate = media & (place.size - place.rank <= 2 * going)
        score = torch.where(candidate, attention + self.diversity * self._distance(view, attention, media), attention)
        order = ranks(score, torch.where(media, candidate, 2)).rank + torch.where(candidate, place.size, 0)
        return -torch.where(media, order, 0).float()

    def _distance(self, view: View, attention: Tensor, media: Tensor) -> Float[Tensor, "batch tokens"]:
        """Chunks from each token to the key chunk, over the index of the last; 0 where a second is unknown."""
        chunk = torch.floor(view.second / self.chunk)
        key = attention.masked_fill(~media, -1.0).argmax(1, keepdim=True)
        last = torch.floor(view.last_second / self.chunk).nan_to_num(nan=0.0).clamp(min=1)[:, None]
        return ((chunk - chunk.gather(1, key)).abs() / last).nan_to_num(nan=0.0)
