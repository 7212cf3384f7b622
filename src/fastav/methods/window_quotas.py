"""Keep what the last query attends to most, in quotas of windows and modalities."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fastav.layout import Modality
from fastav.method import Method, Signal, View
from fastav.methods._options import require_number
from fastav.methods._order import radical_inverse
from fastav.methods._windows import Windows, runs, windows_of

_LEAST = 1e-12  # weight of a group that gets no attention


@dataclass(frozen=True, slots=True)
class WindowQuotas(Method):
    """SEATS' cuts inside the decoder: the last query's attention decides how much of each window stays, and what.

    A group is a run of video (or images) or of sound in the prompt; the first run of pictures and the first of sound
    are one window, the second ones the next, and so on. Each group gets a quota of the kept tokens by its weight, and
    keeps at least one token; within it the tokens with the highest attention stay. Quotas are shared out by Webster's
    method as one score, so that any number of kept tokens fits: -(rank in the group + 1/2) / weight. Attention is that
    of the layer about to run.

    temperature: None for weights that are the attention that a group receives in all; a number for the paper's weights:
    the softmax of the mean attention / temperature over the groups of pictures and over those of sound, their mean as
    the window's weight, and inside a window pictures : sound = softmax of each times its number of tokens in all.

    Source: arXiv:2605.20035, section 3 (windows and modalities inside the decoder; its temperature is 0.1). Differs:
    the paper rounds and hands round remainders, which Webster's method does not need; None is ours.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.OWN_LAST_QUERY, Signal.FRAMES, Signal.SECONDS})
    temperature: float | int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None:
            require_number("temperature", self.temperature, 1e-6, 1e6)

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """2 to 3 for the first token of a group, minus the quotient of Webster's method for others; text 4."""
        windows, n = windows_of(view, runs), view.slots.shape[1]
        is_token = windows.tokens < n
        attention = windows.gather(view[Signal.OWN_LAST_QUERY])
        weight = attention.sum(2)
        if self.temperature is not None:
            weight = _weights(view, windows, attention, is_token, self.temperature)
        order = attention.masked_fill(~is_token, -1.0).argsort(dim=2, descending=True, stable=True)
        rank = order.argsort(dim=2)
        quotient = (rank + 0.5) / weight[..., None].clamp(min=_LEAST)
        spread = 3 - radical_inverse(windows.order)[..., None].expand_as(quotient)
        score = torch.where(rank == 0, spread, -quotient)
        return torch.where(view.modality > Modality.TEXT, windows.per_token(score * is_token, n), 4.0)


def _weights(
    view: View, windows: Windows, attention: Tensor, is_token: Tensor, temperature: float | int
) -> Float[Tensor, "batch windows"]:
    """The paper's weights, where a window is a group."""
    count = is_token.sum(2)
    mean = attention.sum(2) / count.clamp(min=1)
    is_sound = windows.gather((view.modality == Modality.AUDIO).float()).amax(2) > 0
    softmax, total = torch.zeros_like(mean), torch.zeros_like(mean)
    for kind in (is_sound, ~is_sound):
        own = kind & (count > 0)
        logits = (mean / temperature).masked_fill(~own, -torch.inf)
        softmax = torch.where(own, logits.softmax(1), softmax)
        total = torch.where(own, (count * own).sum(1, keepdim=True).float(), total)
    same_window = (windows.order[:, :, None] == windows.order[:, None]) & (count > 0)[:, None]
    window = (softmax[:, None] * same_window).sum(2) / same_window.sum(2).clamp(min=1)
    share = softmax * total
    return window * share / (share[:, None] * same_window).sum(2).clamp(min=_LEAST)
