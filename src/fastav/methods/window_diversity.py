"""Keep tokens that are far from each other, in windows of time."""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from fastav.layout import Modality
from fastav.method import ENCODER_SIGNALS, Method, Signal, View
from fastav.methods._options import require_integer, require_number
from fastav.methods._order import radical_inverse
from fastav.methods._windows import Windows, by_time, windows_of

_PICTURES = (Modality.VIDEO, Modality.IMAGE)
_SAME = 1e-5  # distance that the rounding of float32 leaves between equal tokens
_BLOCK_BYTES = 1 << 28  # of hidden states and distances in memory at once


@dataclass(frozen=True, slots=True)
class WindowDiversity(Method):
    """SEATS' first stage: greedy max-min diversity within windows of time, which all keep the same share.

    A window is `frames` frames of video (of Qwen: temporal grids of two frames), `seconds` of sound, or one image. The
    first choice in a window is the token whose nearest other token is farthest; each further choice is the token that
    is farthest from all chosen ones, by the cosine of the hidden states. Both distances are multiplied by the attention
    that the token receives in its encoder's last layer, if the model's adapter provides it.

    A budget is shared out among its windows in proportion to their tokens (Webster's method), so that any number of
    kept tokens fits; each window keeps at least one, or windows spread evenly over the clip do where there are too few.

    Cost: s d for each token of a window of s tokens and d features, and about eight small kernels for each token that
    the fullest window keeps.

    Source: arXiv:2605.20035, section 3 (diversity before the decoder). Differs: the paper rounds the share in each
    window; here windows share one budget, and where the layout is that of another model, its frames and seconds stand
    for the paper's grids and 50 tokens.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.HIDDEN_STATES, Signal.FRAMES, Signal.SECONDS})
    wants: ClassVar[frozenset[Signal]] = ENCODER_SIGNALS
    frames: int = 2
    seconds: float | int = 2

    def __post_init__(self) -> None:
        require_integer("frames", self.frames, 1)
        require_number("seconds", self.seconds, 0.01, 1e6)

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """2 to 3 for a window's first choice, minus the share of its tokens chosen before for others; text 4."""
        windows = windows_of(view, lambda layout: by_time(layout, self.frames, self.seconds))
        n = view.slots.shape[1]
        is_token = windows.tokens < n
        rank = _ranks(view, windows, _most(view, windows))
        size = is_token.sum(2, keepdim=True)
        spread = 3 - radical_inverse(windows.order)[..., None].expand_as(rank)
        score = torch.where(rank == 0, spread, -(rank + 0.5) / size.clamp(min=1))
        return torch.where(view.modality > Modality.TEXT, windows.per_token(score * is_token, n), 4.0)


def _most(view: View, windows: Windows) -> int:
    """A bound on the tokens that one window keeps, from the layouts and budgets alone.

    By Webster's method a window of s of the pool's n tokens in w windows keeps at most s (k + w / 2) / n + 1 of k.
    """
    size = windows.tokens.shape[2]
    if view.kept is None:
        return size
    if view.slots.shape[1] < view.columns:  # how many tokens earlier cuts have left in a window is not known here
        return min(size, max([*view.kept.values(), 1]))
    most = 1
    for pool, kept in view.kept.items():
        for row in windows.sizes:
            own = [count for modality, count in row if modality in pool]
            if own:
                most = max(most, ceil(max(own) * (kept + len(own) / 2) / sum(own) + 1.5))
    return min(size, most)


def _ranks(view: View, windows: Windows, most: int) -> Int[Tensor, "batch windows size"]:
    """The step at which each token is chosen in its window; for those never chosen, ranks behind by distance."""
    hidden, weight = normalize(view.hidden.float(), dim=-1), _weight(view)
    batch, n_windows, size = windows.tokens.shape
    block = max(1, _BLOCK_BYTES // (4 * batch * size * (size + hidden.shape[2])))
    parts: list[Tensor] = []
    for first in range(0, n_windows, block):
        part = Windows(windows.tokens[:, first : first + block], windows.order[:, first : first + block], ())
        parts.append(_greedy(part.gather(hidden), part.gather(weight), part.tokens < view.slots.shape[1], most))
    return torch.cat(parts, dim=1)


def _weight(view: View) -> Float[Tensor, "batch tokens"]:
    """The attention that each token receives in its encoder; 1 for modalities whose encoder's is not known."""
    modality, weight = view.modality, torch.ones(view.slots.shape, device=view.slots.device)
    for signal, kinds in ((Signal.AUDIO_ENCODER, (Modality.AUDIO,)), (Signal.VISION_ENCODER, _PICTURES)):
        if (attention := view.get(signal)) is not None:
            is_own = torch.stack([modality == kind for kind in kinds]).any(0)
            weight = torch.where(is_own, attention, weight)
    return weight


def _greedy(
    hidden: Float[Tensor, "batch windows size features"],
    weight: Float[Tensor, "batch windows size"],
    is_token: Bool[Tensor, "batch windows size"],
    most: int,
) -> Int[Tensor, "batch windows size"]:
    """Greedy choices in every window at once."""
    size = hidden.shape[2]
    distance = 1 - hidden @ hidden.transpose(2, 3)
    distance = distance.masked_fill(distance < _SAME, 0.0) * weight[:, :, None]  # of a candidate, in the last axis
    itself = torch.eye(size, dtype=torch.bool, device=hidden.device)
    nearest = distance.masked_fill(itself | ~is_token[..., None], torch.inf).amin(2)
    nearest = nearest.masked_fill(nearest == torch.inf, 0.0)  # of a token alone in its window
    chosen_at = torch.full(is_token.shape, size, device=hidden.device)
    left = nearest
    for step in range(min(most, size)):
        candidates = left.masked_fill(~is_token | (chosen_at < size), -torch.inf)
        best = candidates.argmax(2, keepdim=True)
        is_chosen = torch.isfinite(candidates.gather(2, best))
        chosen_at.scatter_(2, best, torch.where(is_chosen, step, chosen_at.gather(2, best)))
        to_chosen = distance.gather(2, best[..., None].expand(-1, -1, -1, size))[:, :, 0]
        left = to_chosen if step == 0 else torch.minimum(left, to_chosen)
    behind = left.masked_fill(chosen_at < size, -torch.inf)
    rank = most + behind.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    return torch.where(chosen_at < size, chosen_at, rank)
