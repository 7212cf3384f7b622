"""Video tokens that are unlike their frame and unlike the video stay, more of them in unusual frames."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from fastav.layout import Modality
from fastav.method import Method, Signal, View
from fastav.methods._order import ranks, rows_at

_WIDTHS = tuple(2.0**power for power in range(-3, 2))  # of the Gaussians, as variances
_TEMPERATURE = 0.01


@dataclass(frozen=True, slots=True)
class Vidcom2(Method):
    """VidCom2: uniqueness within frame and video decides, and unusual frames keep more.

    On the half of the channels that vary least over the video, a token's likeness to a centre is a sum of Gaussians of
    the distance between normalised features. A frame's budget is the common share times 1 + p - mean(p), p being the
    softmax over frames of minus the mean likeness to the video's centre; in each frame the tokens stay that are least
    like their frame's and the video's centre. Other modalities have no frames to balance: they score below video.

    Source: arXiv:2505.14454, section 3; formulas as in the group's code. Differs: all frames together keep what the
    plan says, where rounding every frame by itself gives a number that depends on the scores.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.HIDDEN_STATES, Signal.FRAMES})

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Minus the share of its frame's tokens that are less like the centres, over the frame's weight."""
        video = view.modality == Modality.VIDEO
        # rows must not depend on what they are padded with: sums over tokens are taken in double precision
        features = normalize(_quiet_half(view.hidden.double(), video), dim=-1)
        frame = torch.where(video, view.frame + 1, -1)
        alike = _likeness(features, _centre(features, torch.where(video, 0, -1)))
        weight = _weights(alike, frame, video)
        place = ranks(-(alike + _likeness(features, _centre(features, frame))), frame)
        share = (place.rank + 0.5) / (place.size * weight)
        return -torch.where(video, ranks(-share, video).rank, video.sum(1, keepdim=True)).float()


def _quiet_half(hidden: Float[Tensor, "batch tokens features"], video: Tensor) -> Float[Tensor, "batch tokens half"]:
    """The half of the features that vary least over the video."""
    count = video.sum(1)[:, None].clamp(min=1)
    shown = video[..., None]
    mean = torch.where(shown, hidden, 0.0).sum(1) / count
    variance = torch.where(shown, (hidden - mean[:, None]) ** 2, 0.0).sum(1) / count
    half = variance.argsort(dim=1, stable=True)[:, : hidden.shape[2] // 2]
    return hidden.gather(2, half[:, None].expand(-1, hidden.shape[1], -1))


def _centre(
    features: Float[Tensor, "batch tokens features"], group: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens features"]:
    """The mean of each token's group."""
    place = ranks(torch.zeros_like(group), group)
    start = place.order.argsort(dim=1) - place.rank
    head = place.order.gather(1, start)  # a group's first token stands for it
    total = torch.zeros_like(features).scatter_add_(1, head[..., None].expand_as(features), features)
    return rows_at(total, head) / place.size[..., None]


def _likeness(
    features: Float[Tensor, "batch tokens features"], centre: Float[Tensor, "batch tokens features"]
) -> Float[Tensor, "batch tokens"]:
    distance = ((features - centre) ** 2).sum(-1)
    return torch.stack([torch.exp(-distance / (2 * width)) for width in _WIDTHS]).sum(0)


def _weights(
    alike: Float[Tensor, "batch tokens"], frame: Int[Tensor, "batch tokens"], video: Tensor
) -> Float[Tensor, "batch tokens"]:
    """The budget of each token's frame, as a multiple of the common share."""
    unusual = -_centre(alike[..., None], frame)[..., 0]
    place = ranks(torch.zeros_like(frame), frame)
    leads = video & (place.rank == 0)  # one token for each frame
    scores = (unusual / _TEMPERATURE).masked_fill(~leads, -torch.inf)
    scores = torch.where(leads.any(1, keepdim=True), scores, 0.0)
    odds = torch.where(leads, scores.softmax(1), 0.0)
    mean = odds.sum(1, keepdim=True) / leads.sum(1, keepdim=True).clamp(min=1)
    start = place.order.argsort(dim=1) - place.rank
    return 1 + odds.gather(1, place.order.gather(1, start)) - mean
