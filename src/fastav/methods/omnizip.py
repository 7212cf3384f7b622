"""Keep audio that its encoder attends to, and more of the video where more audio is kept."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from fastav.layout import Modality
from fastav.method import Method, Signal, View
from fastav.methods._options import require_integer, require_number
from fastav.methods._order import dense_ranks, earlier, frame_groups, ranks, rows_at, temporal_ranks

_BLOCK = 256  # tokens whose similarities to all others are in memory at once
_NEAREST = 5  # neighbours whose distances give a token's density
_LOW, _HIGH = 0.35, 0.75  # share of a window's video to drop if all, and if none, of its audio is kept by attention
_WINDOW_BITS = 32  # of a window's number in a sort key
_RATE = 2  # sampled frames a second, if seconds are unknown


class _Audio(NamedTuple):
    """Audio tokens: all of them, those kept by attention, those kept as anchors, and their order of keeping."""

    member: Bool[Tensor, "batch tokens"]
    dominant: Bool[Tensor, "batch tokens"]
    anchor: Bool[Tensor, "batch tokens"]
    order: Int[Tensor, "batch tokens"]


@dataclass(frozen=True, slots=True)
class Omnizip(Method):
    """OmniZip: ranks audio by its encoder's attention, and video in proportion to the audio kept in each window.

    Audio: the tokens that the encoder attends to most are kept, and evenly spaced anchors among the others. Each
    dropped token belongs to the anchor that is most similar to it. Each anchor is merged with `merged` of its tokens,
    those that are most similar to a video token of their window (to the anchor, if their window has no video): it
    becomes the mean of itself and of their average, which is weighted by the softmax of that similarity.

    Video: a window loses 0.75 - 0.4 s of its tokens, where s is the share of its audio that is kept by attention; a
    window without audio loses the mean share of the others. All windows are then scaled equally to the number of tokens
    that the plan drops. In the first, third, ... frame of a window, density peaks are kept (density, from the 5 nearest
    tokens of the frame, times distance to the nearest denser one); in the second, fourth, ... frame, tokens that are
    least similar to the same place in the previous frame.

    A window is `window` seconds, or twice as many sampled frames in prompts whose seconds are unknown. Tokens without a
    known time are in no window. Text scores highest; images are treated like video.

    audio: the share of audio that this step keeps, anchors included, which must equal the plan's for the paper's
    choice. anchors: share of all audio. Cost: two products of all tokens with all for the scores, two for merging, in
    blocks.

    Source: arXiv:2511.14582, section 3; details that digests of it leave open follow its authors' code. Differs: that
    code does not scale the two extreme windows, and limits the others to 0.35 and 0.75; it counts anchors in s; it
    compares audio with all video; it rounds each frame down by itself.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.AUDIO_ENCODER, Signal.HIDDEN_STATES, Signal.FRAMES, Signal.SECONDS}
    )
    audio: float | int = 0.75
    anchors: float | int = 0.05
    merged: int = 3
    window: float | int = 2.0

    def __post_init__(self) -> None:
        require_number("audio", self.audio, 0, 1)
        require_number("anchors", self.anchors, 0, 1)
        require_integer("merged", self.merged, 0)
        require_number("window", self.window, 1e-3, 1e6)

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """1 for text; else minus the share of the token's modality to keep before it."""
        audio, modality = self._audio(view), view.modality
        ranked = ranks(_visual_scores(view, audio, self._windows(view)), modality)
        share = torch.where(audio.member, audio.order, ranked.rank) / ranked.size
        return torch.where(modality > Modality.TEXT, -share, 1.0)

    def merge(
        self, view: View, indices: Int[Tensor, "batch kept"], valid: Bool[Tensor, "batch kept"]
    ) -> Float[Tensor, "batch kept features"]:
        """The hidden states of the kept tokens, with dropped audio merged into anchors."""
        audio, rows = self._audio(view), rows_at(view.hidden, indices)
        hidden = view.hidden.float()
        unit = normalize(hidden, dim=-1)
        is_kept = torch.zeros_like(view.slots).scatter_add(1, indices, valid.long()) > 0
        is_anchor = audio.anchor.gather(1, indices) & valid
        to_anchor, column = _nearest_anchor(unit, rows_at(unit, indices), is_anchor)
        to_video = _nearest_in_window(unit, self._windows(view), view.modality > Modality.AUDIO)
        score = torch.where(to_video.isfinite(), to_video, to_anchor)
        is_merged = audio.member & ~is_kept & is_anchor.any(1, keepdim=True)
        is_merged &= ranks(score, torch.where(is_merged, column, -1)).rank < self.merged
        weight = torch.where(is_merged, score.exp(), 0.0)
        total = torch.zeros_like(indices, dtype=weight.dtype).scatter_add(1, column, weight)
        columns = column[..., None].expand_as(hidden)
        weighted_sum = torch.zeros_like(rows, dtype=hidden.dtype).scatter_add(1, columns, weight[..., None] * hidden)
        mean = (rows + weighted_sum / total.clamp(min=1e-6)[..., None]) / 2
        return torch.where(total[..., None] > 0, mean.to(rows.dtype), rows)

    def _audio(self, view: View) -> _Audio:
        """The audio tokens to keep by attention and as anchors, and the order in which to keep audio."""
        attention, member = view[Signal.AUDIO_ENCODER], view.modality == Modality.AUDIO
        size = member.sum(1, keepdim=True)
        n_kept = (size.double() * self.audio - 1e-6).ceil().long()
        n_anchors = (size.double() * self.anchors + 0.5).long().minimum(n_kept)
        dominant = member & (ranks(attention, member).rank < n_kept - n_anchors)
        others = member & ~dominant
        n_others = others.sum(1, keepdim=True).clamp(min=1)
        number = others.cumsum(1) * n_anchors  # one anchor in every n_others / n_anchors, starting with the first
        anchor = others & (-(-number // n_others) > -(-(number - n_anchors) // n_others))
        kind = torch.where(dominant, 0, torch.where(anchor, 1, torch.where(member, 2, 3)))
        begin = torch.where(dominant, 0, torch.where(anchor, n_kept - n_anchors, n_kept))
        ranked = ranks(torch.where(anchor, 0.0, attention), kind)
        return _Audio(member, dominant, anchor, begin + ranked.rank)

    def _windows(self, view: View) -> Int[Tensor, "batch tokens"]:
        """The number of each token's window, in the order of clips and time; -1 for none."""
        by_second = (view.second / self.window).floor().nan_to_num(nan=-1.0).long()
        by_frame = (view.frame / (_RATE * self.window)).floor().long()
        window = torch.where(view.last_second.isfinite(), by_second, by_frame)
        return torch.where(window >= 0, (view.item.clamp(min=0) << _WINDOW_BITS) | window.clamp(min=0), -1)


def _visual_scores(view: View, audio: _Audio, window: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """Scores of video and images: the share of their frame to drop before them, over the share of their window."""
    visual = view.modality > Modality.AUDIO
    dense = dense_ranks(window, torch.zeros_like(window))
    ranked = ranks(_frame_scores(view, dense), torch.where(visual, frame_groups(view), -1))
    below = (ranked.size - 1 - ranked.rank + 0.5) / ranked.size
    return below.double() / _shares(audio, dense, window >= 0, visual)


def _shares(
    audio: _Audio,
    window: Int[Tensor, "batch tokens"],
    in_window: Bool[Tensor, "batch tokens"],
    visual: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """The share of each token's window to drop, before scaling.  window: numbered without gaps."""
    n_audio, n_dominant = (
        torch.zeros_like(window, dtype=torch.double).scatter_add(1, window, part.double()).gather(1, window)
        for part in (audio.member & in_window, audio.dominant & in_window)
    )
    share = _HIGH - (_HIGH - _LOW) * n_dominant / n_audio.clamp(min=1)
    has_audio = visual & in_window & (n_audio > 0)
    mean = torch.where(has_audio, share, 0.0).sum(1, keepdim=True) / has_audio.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(has_audio.any(1, keepdim=True), mean, _HIGH)
    return torch.where(has_audio, share, mean).round(decimals=6)  # equal shares must not differ by the order of sums


def _frame_scores(view: View, window: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """Scores of tokens among those of their frame."""
    modality, hidden = view.modality, view.hidden.float()
    frame = torch.where(modality > Modality.AUDIO, frame_groups(view), -1)
    is_odd = dense_ranks(view.frame, ((modality + 1) << _WINDOW_BITS) | window) % 2 == 1
    in_time = temporal_ranks(view)
    similarity = cosine_similarity(hidden, rows_at(hidden, earlier(in_time.order, 1)), dim=-1)
    change = torch.where(in_time.rank > 0, -similarity, 1.0)
    return torch.where(is_odd, change, _peaks(normalize(hidden, dim=-1), frame))


def _peaks(
    unit: Float[Tensor, "batch tokens features"], group: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Density times distance to the nearest denser token of the group; for the densest, to the farthest token."""
    densities: list[Tensor] = []
    for rows in _blocks(unit):
        distance = _distances(unit, group, rows)
        total, count = torch.zeros_like(distance[..., 0]), torch.zeros_like(distance[..., 0])
        for _ in range(_NEAREST):
            nearest = distance.min(-1)
            exists = nearest.values.isfinite()
            total, count = total + torch.where(exists, nearest.values, 0.0), count + exists
            distance.scatter_(-1, nearest.indices[..., None], torch.inf)
        densities.append(torch.exp(-total / count.clamp(min=1)))
    density = torch.cat(densities, dim=1)
    to_denser: list[Tensor] = []
    for rows in _blocks(unit):
        distance = _distances(unit, group, rows)
        nearest_denser = distance.masked_fill(density[:, None] <= density[:, rows, None], torch.inf).amin(-1)
        farthest = torch.where(distance.isfinite(), distance, 0.0).amax(-1)
        to_denser.append(torch.where(nearest_denser.isfinite(), nearest_denser, farthest))
    return density * torch.cat(to_denser, dim=1)


def _blocks(x: Tensor) -> list[slice]:
    return [slice(first, first + _BLOCK) for first in range(0, x.shape[1], _BLOCK)]


def _distances(
    unit: Float[Tensor, "batch tokens features"], group: Int[Tensor, "batch tokens"], rows: slice
) -> Float[Tensor, "batch rows tokens"]:
    """Cosine distances of these tokens to others of their group; infinite to themselves and to all other tokens."""
    distance = 1 - unit[:, rows] @ unit.transpose(1, 2)
    excluded = group[:, rows, None] != group[:, None]
    excluded |= torch.ones_like(excluded[0]).tril(rows.start).triu(rows.start)
    return distance.masked_fill(excluded, torch.inf)


def _nearest_anchor(
    unit: Float[Tensor, "batch tokens features"],
    rows: Float[Tensor, "batch kept features"],
    is_anchor: Bool[Tensor, "batch kept"],
) -> tuple[Float[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """The similarity of each token to its most similar anchor, and that anchor's column."""
    blocks = [
        (unit[:, block] @ rows.transpose(1, 2)).masked_fill(~is_anchor[:, None], -torch.inf).max(-1)
        for block in _blocks(unit)
    ]
    return torch.cat([best.values for best in blocks], dim=1), torch.cat([best.indices for best in blocks], dim=1)


def _nearest_in_window(
    unit: Float[Tensor, "batch tokens features"],
    window: Int[Tensor, "batch tokens"],
    visual: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """The similarity of each token to the most similar visual token of its window; -inf if there is none."""
    blocks: list[Tensor] = []
    in_window = visual & (window >= 0)
    for rows in _blocks(unit):
        compared = in_window[:, None] & (window[:, rows, None] == window[:, None])
        blocks.append((unit[:, rows] @ unit.transpose(1, 2)).masked_fill(~compared, -torch.inf).amax(-1))
    return torch.cat(blocks, dim=1)
