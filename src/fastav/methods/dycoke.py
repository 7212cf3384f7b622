"""In groups of four frames, what repeats an earlier frame goes."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastav.layout import Modality
from fastav.method import Method, View
from fastav.methods._order import courses, earlier, ranks, rows_at

_GROUP = 4


@dataclass(frozen=True, slots=True)
class Dycoke(Method):
    """DyCoke's temporal merging: of every four frames the first stays whole, of the others what differs in time.

    The second and fourth frame are compared with the frame before, the third with the first, by the cosine of
    co-located tokens; every frame loses the same share, its most similar tokens first. A published ratio K keeps
    (1 + 3 (1 - K)) / 4 of the video: 47.5 % for K = 0.7. Audio, as in "DyCoke (V&A)" of papers on omni models, is
    taken as frames of one token, whose tokens compete with each other.

    Source: arXiv:2411.15024, section 3 (temporal token merging). Differs: similar tokens are dropped, as in the
    official code, not averaged; a last, incomplete group is treated like the others, where that code leaves it whole;
    without the dynamic KV cache of its second half. How omni papers form frames of audio is not stated: ours.
    """

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the share of its frame's tokens that differ more; 1 for frames that stay whole."""
        course = courses(view)
        turn = course.rank % _GROUP
        hidden = view.hidden.float()
        other = rows_at(hidden, earlier(course.order, torch.where(turn == 2, 2, 1)))
        likeness = cosine_similarity(hidden, other, dim=-1)
        whole, modality = turn == 0, view.modality
        frame = torch.where(modality == Modality.AUDIO, 0, view.frame + 1)
        group = torch.where(whole, -1, ((modality + 1) << 21) | frame)
        place = ranks(-likeness, group)
        return torch.where(whole, 1.0, -place.rank / place.size)
