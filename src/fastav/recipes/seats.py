"""SEATS."""

from itertools import pairwise
from math import exp

from fastav.budgets import Between, Tokens
from fastav.errors import PlanError
from fastav.plan import Keep, Plan, Step
from fastav.target import Target

_LAYERS = ("16/28", "18/28", "20/28")  # of Qwen2.5-Omni-7B's 28 layers; 27, 31 and 35 of Qwen3-Omni's 48
_REMOVAL = "23/28"
_SURPLUS = 1.4  # tokens that enter the decoder, over those of the mean over layers
_RATIOS = ((0.10, 0.06, 0.35), (0.15, 0.10, 0.45), (0.25, 0.20, 0.55), (0.35, 0.30, 0.65))  # mean, video, audio


def seats(retention: float | int = 0.25) -> Plan:
    """Keep what differs before the decoder, then in its middle what the question attends to, and nothing at its end.

    retention: share of audio and video, mean over layers. 1.4 times as much enters the decoder, video and audio in the
    proportions of the paper's settings (0.35, 0.25, 0.15 and 0.10), between which they are interpolated. Before layers
    16, 18 and 20 of 28 as many tokens are dropped as meet the retention, in the proportions 1 : e : e^2, and before
    layer 23 all audio and video. Each of the three cuts also reduces the KV cache of the layers before it.

    Source: arXiv:2605.20035.
    Differs: see the methods `window-diversity` and `window-quotas`. The paper has one total only for Qwen's mixture of
    audio and video; here 1.4 times the retention enters for every mixture. The removal of all audio and video leaves
    the KV cache of earlier layers as it is, about which the paper says nothing.
    """
    if not 0 < retention <= 1:
        raise PlanError(f"a retention must be in (0, 1], got {retention!r}")
    video, audio = _ratios(float(retention))
    entering = min(1.0, _SURPLUS * retention)
    pictures, total = Between(video, video), Between(entering, entering)
    first = Keep(video=pictures, image=pictures, audio=Between(audio, audio), total=total)
    steps = [Step(layers="0", method="window-diversity", keep=first)]
    dropped = [sum(exp(i) for i in range(n + 1)) for n in range(len(_LAYERS))]
    for layer, part in zip(_LAYERS, dropped, strict=True):
        steps.append(
            Step(
                layers=layer,
                method="window-quotas",
                options={"temperature": 0.1},
                keep=Keep(media=Between(round(1 - part / dropped[-1], 6), 1)),
                earlier_caches=True,
            )
        )
    steps.append(Step(layers=_REMOVAL, method="keep-first", keep=Keep(media=Tokens(0))))
    return Plan(tuple(steps), "seats", target=Target(retention=retention))


def _ratios(retention: float) -> tuple[float, float]:
    """The shares of video and audio of the paper's settings, interpolated; beyond them, on the line of the last two."""
    pairs = list(pairwise(_RATIOS))
    (r0, v0, a0), (r1, v1, a1) = next((pair for pair in pairs if retention <= pair[1][0]), pairs[-1])
    place = (retention - r0) / (r1 - r0)
    shares = (v0 + place * (v1 - v0), a0 + place * (a1 - a0))
    video, audio = (round(min(1.0, max(0.01, share)), 6) for share in shares)
    return video, audio
