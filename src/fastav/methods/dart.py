"""Tokens that repeat none of a few pivots stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from fastav.layout import MEDIA, Modality
from fastav.method import Method, Signal, View
from fastav.methods._options import require_whole
from fastav.methods._order import ranks, rows_at


@dataclass(frozen=True, slots=True)
class Dart(Method):
    """DART: a few pivots stay, and of each pivot the tokens that are least similar to it.

    Pivots are the tokens with the largest keys (L1 norm, all heads together): of every modality `pivots`, and `texts`
    of the text behind the clip. A token's score is its best place in the lists of its modality's pivots and the texts',
    each sorted by cosine similarity of what the layer is entered with, the least similar first: what stays is, as
    published, the union of equally long beginnings of all lists. A pooled budget takes the same share of each modality.

    Source: arXiv:2502.11494, section 4 (there for image tokens at layer 2, 4 pivots of image and 4 of text). Differs:
    keys are those after RoPE, whose L1 norm depends on where a prompt starts; a token in several lists counts once, and
    all lists go on evenly to fill the budget; hidden states are compared without the final norm's weights, which ports
    of the official code apply first.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.KEYS, Signal.HIDDEN_STATES})
    pivots: int = 4
    texts: int = 4

    def __post_init__(self) -> None:
        require_whole("pivots", self.pivots, 1)
        require_whole("texts", self.texts, 0)

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """1 for pivots; else minus the share of its modality that stands before it in the list it is highest in."""
        modality, hidden = view.modality, normalize(view.hidden.float(), dim=-1)
        size = view.keys.float().abs().sum((1, 3))
        asked = view.question & (modality == Modality.TEXT)
        texts = _largest(size, asked, self.texts)
        best = torch.zeros_like(size)
        for m in MEDIA:
            member = modality == int(m)
            own = _largest(size, member, self.pivots)
            pivotal = torch.zeros_like(member).scatter(1, own, member.gather(1, own))
            others = member & ~pivotal
            place = torch.ones_like(size)
            known = torch.cat([member.gather(1, own), asked.gather(1, texts)], dim=1)
            pivots = rows_at(hidden, torch.cat([own, texts], dim=1))
            likeness = hidden @ pivots.transpose(1, 2)
            for column in range(pivots.shape[1]):
                listed = ranks(-likeness[..., column], others)
                place = torch.where(known[:, column, None], place.minimum(listed.rank / listed.size), place)
            best = torch.where(pivotal, 1.0, torch.where(others, -place, best))
        return best


def _largest(
    size: Float[Tensor, "batch tokens"], member: Bool[Tensor, "batch tokens"], count: int
) -> Int[Tensor, "batch picked"]:
    """Indices of so many members with the largest keys; of others where there are not so many."""
    return size.masked_fill(~member, -1.0).argsort(dim=1, descending=True, stable=True)[:, :count]
