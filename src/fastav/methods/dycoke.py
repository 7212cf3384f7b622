"""Drop tokens that repeat an earlier frame, in groups of four frames."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastav.layout import Modality
from fastav.method import Method, Signal, View
from fastav.methods._order import (
    ITEM_BITS,
    earlier,
    frame_groups,
    in_frames,
    radical_inverse,
    ranks,
    rows_at,
    temporal_ranks,
)

_GROUP = 4


@dataclass(frozen=True, slots=True)
class Dycoke(Method):
    """DyCoke's temporal merging: keeps the first of every four frames, and from the others what differs in time.

    The second and fourth frame are compared with the previous frame, the third with the first, by the cosine of
    co-located tokens; each of these frames loses the same share, its most similar tokens first. A published ratio K
    keeps (1 + 3 (1 - K)) / 4 of the video: 47.5 % for K = 0.7. Audio, as in "DyCoke (V&A)" of papers on omni models, is
    treated as frames of one token, whose tokens compete with each other; so is video whose frames are unknown.

    For shares below a quarter the paper has no rule. Here each first frame then loses the same share, the tokens that
    are most similar to the previous first frame first; of first frames of one token, those are dropped that leave the
    others evenly spaced over the clip.

    Source: arXiv:2411.15024, section 3 (temporal token merging). Differs: similar tokens are dropped, as in the
    official code, not averaged; a last, incomplete group is treated like the others, while that code keeps all of it;
    the dynamic KV cache of the paper's second half is left out. Papers on omni models do not state how they form frames
    of audio, so these frames are ours.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.HIDDEN_STATES, Signal.FRAMES})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the share of the frame's tokens that differ more; for first frames of groups, 2 minus that share."""
        in_time, modality, has_frame = temporal_ranks(view), view.modality, in_frames(view)
        number = in_time.rank % _GROUP
        is_first = number == 0
        hidden = view.hidden.float()
        n_ranks = torch.where(is_first, _GROUP, torch.where(number == 2, 2, 1))
        similarity = cosine_similarity(hidden, rows_at(hidden, earlier(in_time.order, n_ranks)), dim=-1)
        similarity = torch.where(in_time.rank == 0, -1.0, similarity)  # no token precedes the first
        group, frame = in_time.rank // _GROUP, torch.where(has_frame, frame_groups(view), view.item + 1)
        frame = torch.where(is_first & ~has_frame, (group << ITEM_BITS) | (view.item + 1), frame)  # of one token each
        ranked = ranks(-similarity, (((modality + 1) << 1 | is_first.long()) << 44) | frame)
        share = (ranked.rank + torch.where(is_first, radical_inverse(group), 0.0)) / ranked.size
        return torch.where(modality > Modality.TEXT, torch.where(is_first, 2.0, 0.0) - share, 2.0)
