"""Keep video tokens that differ from their frame and from the video, more of them in unusual frames."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from fastav.layout import Modality
from fastav.method import Method, Signal, View
from fastav.methods._order import frame_groups, ranks, rows_at

_WIDTHS = tuple(2.0**power for power in range(-3, 2))  # of the Gaussians, as variances
_TEMPERATURE = 0.01


@dataclass(frozen=True, slots=True)
class Vidcom2(Method):
    """VidCom2: keeps tokens that are unique within frame and video, and more tokens of unusual frames.

    On the half of the channels that vary least over the video, a token's similarity to a centre is a sum of Gaussians
    of the distance between normalised features. A frame's budget is the common share times 1 + p - mean(p), where p is
    the softmax over frames of minus the mean similarity to the video's centre; each frame keeps the tokens that are
    least similar to its own centre and the video's. Several videos of a prompt have centres of their own, and share the
    half of the channels and the mean of p. Other modalities have no frames to balance: they score below video.

    Source: arXiv:2505.14454, section 3; formulas as in the group's code. Differs: all frames together keep the number
    of tokens that the plan gives, while rounding every frame by itself gives a number that depends on the scores.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.HIDDEN_STATES, Signal.FRAMES})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the share of the frame's tokens that are less similar to the centres, over the frame's weight."""
        video = view.modality == Modality.VIDEO
        # rows must not depend on their padding, so sums over tokens are in double precision
        features = normalize(_quiet_half(view.hidden.double(), video), dim=-1)
        frame = torch.where(video, frame_groups(view), -1)
        to_video = _similarity(features, _centre(features, torch.where(video, view.item, -1)))
        weight = _weights(to_video, frame, video)
        ranked = ranks(-(to_video + _similarity(features, _centre(features, frame))), frame)
        share = (ranked.rank + 0.5) / (ranked.size * weight)
        return -torch.where(video, ranks(-share, video).rank, video.sum(1, keepdim=True)).float()


def _quiet_half(hidden: Float[Tensor, "batch tokens features"], video: Tensor) -> Float[Tensor, "batch tokens half"]:
    """The half of the features that vary least over the video."""
    count = video.sum(1)[:, None].clamp(min=1)
    mean = torch.where(video[..., None], hidden, 0.0).sum(1) / count
    variance = torch.where(video[..., None], (hidden - mean[:, None]) ** 2, 0.0).sum(1) / count
    half = variance.argsort(dim=1, stable=True)[:, : hidden.shape[2] // 2]
    return hidden.gather(2, half[:, None].expand(-1, hidden.shape[1], -1))


def _centre(
    features: Float[Tensor, "batch tokens features"], group: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens features"]:
    """The mean of each token's group."""
    ranked = ranks(torch.zeros_like(group), group)
    start = ranked.order.argsort(dim=1) - ranked.rank
    first = ranked.order.gather(1, start)  # the sum of a group is stored at its first token
    total = torch.zeros_like(features).scatter_add_(1, first[..., None].expand_as(features), features)
    return rows_at(total, first) / ranked.size[..., None]


def _similarity(
    features: Float[Tensor, "batch tokens features"], centre: Float[Tensor, "batch tokens features"]
) -> Float[Tensor, "batch tokens"]:
    distance = ((features - centre) ** 2).sum(-1)
    return torch.stack([torch.exp(-distance / (2 * width)) for width in _WIDTHS]).sum(0)


def _weights(
    to_video: Float[Tensor, "batch tokens"], frame: Int[Tensor, "batch tokens"], video: Tensor
) -> Float[Tensor, "batch tokens"]:
    """The budget of each token's frame, as a multiple of the common share.  to_video: similarity to its centre."""
    uniqueness = -_centre(to_video[..., None], frame)[..., 0]
    ranked = ranks(torch.zeros_like(frame), frame)
    is_first = video & (ranked.rank == 0)  # one token for each frame
    scores = (uniqueness / _TEMPERATURE).masked_fill(~is_first, -torch.inf)
    scores = torch.where(is_first.any(1, keepdim=True), scores, 0.0)
    probability = torch.where(is_first, scores.softmax(1), 0.0)
    mean = probability.sum(1, keepdim=True) / is_first.sum(1, keepdim=True).clamp(min=1)
    start = ranked.order.argsort(dim=1) - ranked.rank
    return 1 + probability.gather(1, ranked.order.gather(1, start)) - mean
