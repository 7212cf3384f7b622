"""In groups of four frames, what repeats an earlier frame goes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastav.layout import Modality
from fastav.method import Method, Signal, View
from fastav.methods._order import courses, earlier, framed, ranks, rows_at, spread

_GROUP = 4


@dataclass(frozen=True, slots=True)
class Dycoke(Method):
    """DyCoke's temporal merging: of every four frames the first stays whole, of the others what differs in time.

    The second and fourth frame are compared with the frame before, the third with the first, by the cosine of
    co-located tokens; every frame loses the same share, its most similar tokens first. A published ratio K keeps
    (1 + 3 (1 - K)) / 4 of the video: 47.5 % for K = 0.7. Audio, as in "DyCoke (V&A)" of papers on omni models, is
    taken as frames of one token, whose tokens compete with each other; so is video whose frames are unknown.

    Less than a quarter, for which the paper has no rule: the frames that would stay whole lose the same share each,
    first what is most like the whole frame before; of whole frames of one token, those go that leave the others spread
    evenly over the clip.

    Source: arXiv:2411.15024, section 3 (temporal token merging). Differs: similar tokens are dropped, as in the
    official code, not averaged; a last, incomplete group is treated like the others, where that code leaves it whole;
    without the dynamic KV cache of its second half. How omni papers form frames of audio is not stated: ours.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.HIDDEN_STATES, Signal.FRAMES})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the share of its frame's tokens that differ more; of frames that stay whole, 2 minus that share."""
        course, modality, seen = courses(view), view.modality, framed(view)
        turn = course.rank % _GROUP
        whole = turn == 0
        hidden = view.hidden.float()
        back = torch.where(whole, _GROUP, torch.where(turn == 2, 2, 1))
        likeness = cosine_similarity(hidden, rows_at(hidden, earlier(course.order, back)), dim=-1)
        likeness = torch.where(course.rank == 0, -1.0, likeness)  # nothing is before the first
        group, moment = course.rank // _GROUP, torch.where(seen, view.frame + 1, 0)
        frame = torch.where(whole & ~seen, group, moment)  # each of one token
        place = ranks(-likeness, ((modality + 1) << 23) | (whole.long() << 22) | frame)
        share = (place.rank + torch.where(whole, spread(group), 0.0)) / place.size
        return torch.where(modality > Modality.TEXT, torch.where(whole, 2.0, 0.0) - share, 2.0)
