"""Sound that its encoder attends to stays, and where much of it does, more of the video stays too."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from fastav.layout import Modality
from fastav.method import Method, Signal, View
from fastav.methods._options import require_number, require_whole
from fastav.methods._order import courses, earlier, ranks, rows_at, turns

_BLOCK = 256  # tokens whose likeness to all others is held at once
_NEAREST = 5  # neighbours whose distance tells a token's density
_LOW, _HIGH = 0.35, 0.75  # share of a window's video that goes where all and where none of its audio stays
_RATE = 2  # sampled frames a second, where seconds are unknown


class _Audio(NamedTuple):
    """Of each token: whether it is audio, whether that stays by attention, or as an anchor, and in which order."""

    member: Bool[Tensor, "batch tokens"]
    dominant: Bool[Tensor, "batch tokens"]
    anchor: Bool[Tensor, "batch tokens"]
    order: Int[Tensor, "batch tokens"]


@dataclass(frozen=True, slots=True)
class Omnizip(Method):
    """OmniZip: the audio encoder's attention ranks audio, and how much of a window's stays says how much video does.

    Audio: what the encoder attends to most stays, and evenly spread anchors of the rest. Of what goes, each token
    belongs to the anchor it is most like; of those each anchor takes in the `merged` that are most like a video token
    of their window (most like the anchor, where their window shows nothing): it becomes the mean of itself and of
    theirs, which is weighted by the softmax of that likeness.

    Video: of a window goes 0.75 - 0.4 s of the tokens, s being the share of its audio that stays by attention; without
    audio, the mean over what has some. All windows are then scaled alike to what goes in all, which the plan says. Of a
    window's frames the first, third and so on keep density peaks (density, from the 5 nearest tokens of the frame,
    times distance to the nearest denser one), those between what is least like the same place of the frame before.

    A window is `window` seconds, or twice as many sampled frames in prompts whose seconds are unknown. What has no
    known time is in no window. Text scores above all; images are treated like video.

    audio: the share of audio that this step keeps, anchors included, which must be the plan's for the choice to be the
    paper's. anchors: share of all audio. Cost: two products of all tokens with all for the scores, two for merging,
    in blocks.

    Source: arXiv:2511.14582, section 3; what digests of it leave open as in its authors' code. Differs: that code
    leaves the two extreme windows unscaled, and ends the others at 0.35 and 0.75; it counts anchors in s; it compares
    audio with all video; each of its frames rounds down by itself.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.ENCODER, Signal.HIDDEN_STATES, Signal.FRAMES, Signal.SECONDS}
    )
    audio: float | int = 0.75
    anchors: float | int = 0.05
    merged: int = 3
    window: float | int = 2.0

    def __post_init__(self) -> None:
        require_number("audio", self.audio, 0, 1)
        require_number("anchors", self.anchors, 0, 1)
        require_whole("merged", self.merged, 0)
        require_number("window", self.window, 1e-3, 1e6)

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """1 for text; else minus the share of its modality that is to stay before a token."""
        audio, modality = self._audio(view), view.modality
        place = ranks(_shown_order(view, audio, self._windows(view)), modality)
        before = torch.where(audio.member, audio.order, place.rank) / place.size
        return torch.where(modality > Modality.TEXT, -before, 1.0)

    def merge(
        self, view: View, chosen: Int[Tensor, "batch kept"], real: Bool[Tensor, "batch kept"]
    ) -> Float[Tensor, "batch kept features"]:
        """The tokens that stay as they are, but for anchors that take in others."""
        audio, rows = self._audio(view), rows_at(view.hidden, chosen)
        hidden = view.hidden.float()
        unit = normalize(hidden, dim=-1)
        kept = torch.zeros_like(view.slots).scatter_add(1, chosen, real.long()) > 0
        asking = audio.anchor.gather(1, chosen) & real
        likeness, column = _most_like(unit, rows_at(unit, chosen), asking)
        seen = _most_seen(unit, self._windows(view), view.modality > Modality.AUDIO)
        score = torch.where(seen.isfinite(), seen, likeness)
        goes = audio.member & ~kept & asking.any(1, keepdim=True)
        goes &= ranks(score, torch.where(goes, column, -1)).rank < self.merged
        weight = torch.where(goes, score.exp(), 0.0)
        total = torch.zeros_like(chosen, dtype=weight.dtype).scatter_add(1, column, weight)
        place = column[..., None].expand_as(hidden)
        taken = torch.zeros_like(rows, dtype=hidden.dtype).scatter_add(1, place, weight[..., None] * hidden)
        mean = (rows + taken / total.clamp(min=1e-6)[..., None]) / 2
        return torch.where(total[..., None] > 0, mean.to(rows.dtype), rows)

    def _audio(self, view: View) -> _Audio:
        """What of the audio stays as what, and the order in which it is to stay."""
        attention, member = view[Signal.ENCODER], view.modality == Modality.AUDIO
        size = member.sum(1, keepdim=True)
        total = (size.double() * self.audio - 1e-6).ceil().long()
        anchors = (size.double() * self.anchors + 0.5).long().minimum(total)
        dominant = member & (ranks(attention, member).rank < total - anchors)
        rest = member & ~dominant
        others = rest.sum(1, keepdim=True).clamp(min=1)
        number = rest.cumsum(1) * anchors  # one in every others / anchors, beginning with the first
        anchor = rest & (-(-number // others) > -(-(number - anchors) // others))
        kind = torch.where(dominant, 0, torch.where(anchor, 1, torch.where(member, 2, 3)))
        begin = torch.where(dominant, 0, torch.where(anchor, total - anchors, total))
        place = ranks(torch.where(anchor, 0.0, attention), kind)
        return _Audio(member, dominant, anchor, begin + place.rank)

    def _windows(self, view: View) -> Int[Tensor, "batch tokens"]:
        """Number of each token's window; -1 where it is in none."""
        timed = view.last_second.isfinite()[:, None]
        by_second = (view.second / self.window).floor().nan_to_num(nan=-1.0).long()
        by_frame = (view.frame / (_RATE * self.window)).floor().long()
        return torch.where(timed, by_second, by_frame).clamp(min=-1)


def _shown_order(view: View, audio: _Audio, window: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """What video and images are ranked by: the share of their frame that goes before them, over their window's."""
    modality, shown = view.modality, view.modality > Modality.AUDIO
    dense = turns(window, torch.zeros_like(window))
    place = ranks(_worth(view, dense), torch.where(shown, ((modality + 1) << 21) | (view.frame + 1), -1))
    below = (place.size - 1 - place.rank + 0.5) / place.size
    return below.double() / _shares(audio, dense, window >= 0, shown)


def _shares(
    audio: _Audio,
    window: Int[Tensor, "batch tokens"],
    known: Bool[Tensor, "batch tokens"],
    shown: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """The share that goes of each token's window, before all are scaled.  window: counted without gaps."""
    heard, stays = (
        torch.zeros_like(window, dtype=torch.double).scatter_add(1, window, part.double()).gather(1, window)
        for part in (audio.member & known, audio.dominant & known)
    )
    share = _HIGH - (_HIGH - _LOW) * stays / heard.clamp(min=1)
    guided = shown & known & (heard > 0)
    mean = torch.where(guided, share, 0.0).sum(1, keepdim=True) / guided.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(guided.any(1, keepdim=True), mean, _HIGH)
    return torch.where(guided, share, mean).round(decimals=6)  # equal shares must stay equal, however they are summed


def _worth(view: View, window: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """How much each token of a frame is worth keeping among those of its frame."""
    modality, hidden = view.modality, view.hidden.float()
    frame = torch.where(modality > Modality.AUDIO, ((modality + 1) << 21) | (view.frame + 1), -1)
    odd = turns(view.frame, ((modality + 1) << 21) | window) % 2 == 1
    course = courses(view)
    likeness = cosine_similarity(hidden, rows_at(hidden, earlier(course.order, 1)), dim=-1)
    change = torch.where(course.rank > 0, -likeness, 1.0)
    return torch.where(odd, change, _peaks(normalize(hidden, dim=-1), frame))


def _peaks(
    unit: Float[Tensor, "batch tokens features"], group: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Density times distance to the nearest denser token of the group; of the densest, to the farthest."""
    density = []
    for rows in _blocks(unit):
        distance = _distances(unit, group, rows)
        total, found = torch.zeros_like(distance[..., 0]), torch.zeros_like(distance[..., 0])
        for _ in range(_NEAREST):
            nearest = distance.min(-1)
            there = nearest.values.isfinite()
            total, found = total + torch.where(there, nearest.values, 0.0), found + there
            distance.scatter_(-1, nearest.indices[..., None], torch.inf)
        density.append(torch.exp(-total / found.clamp(min=1)))
    density = torch.cat(density, dim=1)
    apart = []
    for rows in _blocks(unit):
        distance = _distances(unit, group, rows)
        near = distance.masked_fill(density[:, None] <= density[:, rows, None], torch.inf).amin(-1)
        far = torch.where(distance.isfinite(), distance, 0.0).amax(-1)
        apart.append(torch.where(near.isfinite(), near, far))
    return density * torch.cat(apart, dim=1)


def _blocks(x: Tensor) -> list[slice]:
    return [slice(first, first + _BLOCK) for first in range(0, x.shape[1], _BLOCK)]


def _distances(
    unit: Float[Tensor, "batch tokens features"], group: Int[Tensor, "batch tokens"], rows: slice
) -> Float[Tensor, "batch rows tokens"]:
    """Cosine distances of these tokens to others of their group; infinite to themselves and to all else."""
    distance = 1 - unit[:, rows] @ unit.transpose(1, 2)
    other = group[:, rows, None] != group[:, None]
    other |= torch.ones_like(other[0]).tril(rows.start).triu(rows.start)
    return distance.masked_fill(other, torch.inf)


def _most_like(
    unit: Float[Tensor, "batch tokens features"],
    anchors: Float[Tensor, "batch kept features"],
    asking: Bool[Tensor, "batch kept"],
) -> tuple[Float[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Of each token: its likeness to the anchor that it is most like, and that anchor's column."""
    found = [
        (unit[:, rows] @ anchors.transpose(1, 2)).masked_fill(~asking[:, None], -torch.inf).max(-1)
        for rows in _blocks(unit)
    ]
    return torch.cat([best.values for best in found], dim=1), torch.cat([best.indices for best in found], dim=1)


def _most_seen(
    unit: Float[Tensor, "batch tokens features"],
    window: Int[Tensor, "batch tokens"],
    shown: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """Of each token: its likeness to what is most like it of all that its window shows; -inf where that is nothing."""
    best, known = [], shown & (window >= 0)
    for rows in _blocks(unit):
        there = known[:, None] & (window[:, rows, None] == window[:, None])
        best.append((unit[:, rows] @ unit.transpose(1, 2)).masked_fill(~there, -torch.inf).amax(-1))
    return torch.cat(best, dim=1)
