"""Keep a few pivots and the tokens that are least similar to them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from fastav.layout import MEDIA, Modality
from fastav.method import Method, Signal, View
from fastav.methods._options import require_integer
from fastav.methods._order import ranks, rows_at


@dataclass(frozen=True, slots=True)
class Dart(Method):
    """DART: keeps a few pivots, and for each pivot the tokens that are least similar to it.

    Pivots are the tokens with the largest keys (L1 norm over all heads): `pivots` of every modality, and `texts` of the
    text after the clip. Each pivot has a list of tokens, sorted by cosine similarity of the layer's input, the least
    similar first. A token's score is its best rank in the lists of its modality's pivots and of the text's, so that the
    kept tokens are, as published, the union of equally long beginnings of all lists. A pooled budget keeps the same
    share of each modality.

    Source: arXiv:2502.11494, section 4 (for image tokens at layer 2, with 4 pivots of image and 4 of text). Differs:
    keys are those after RoPE, whose L1 norm depends on where a prompt starts; a token in several lists counts once, and
    all lists continue evenly to fill the budget; hidden states are compared without the final norm's weights, which
    ports of the official code apply first.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.KEYS, Signal.HIDDEN_STATES, Signal.QUESTION})
    pivots: int = 4
    texts: int = 4

    def __post_init__(self) -> None:
        require_integer("pivots", self.pivots, 1)
        require_integer("texts", self.texts, 0)

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """1 for pivots; else minus the share of the token's modality before it in the list where it ranks highest."""
        modality, hidden = view.modality, normalize(view.hidden.float(), dim=-1)
        norm = view.keys.float().abs().sum((1, 3))
        question = view.question & (modality == Modality.TEXT)
        texts = _largest(norm, question, self.texts)
        scores = torch.zeros_like(norm)
        for m in MEDIA:
            member = modality == int(m)
            media = _largest(norm, member, self.pivots)
            is_pivot = torch.zeros_like(member).scatter(1, media, member.gather(1, media))
            others = member & ~is_pivot
            best = torch.ones_like(norm)
            exists = torch.cat([member.gather(1, media), question.gather(1, texts)], dim=1)
            pivots = rows_at(hidden, torch.cat([media, texts], dim=1))
            similarity = hidden @ pivots.transpose(1, 2)
            for column in range(pivots.shape[1]):
                ranked = ranks(-similarity[..., column], others)
                best = torch.where(exists[:, column, None], best.minimum(ranked.rank / ranked.size), best)
            scores = torch.where(is_pivot, 1.0, torch.where(others, -best, scores))
        return scores


def _largest(
    norm: Float[Tensor, "batch tokens"], member: Bool[Tensor, "batch tokens"], count: int
) -> Int[Tensor, "batch selected"]:
    """Indices of the `count` members with the largest norms; filled up with other tokens if there are fewer members."""
    return norm.masked_fill(~member, -1.0).argsort(dim=1, descending=True, stable=True)[:, :count]
