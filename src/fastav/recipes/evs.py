"""Efficient Video Sampling."""

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step


def evs(keep: float | int = 0.25) -> Plan:
    """Drop, before the first layer, video that repeats the previous frame, and keep all audio.

    keep: share of video tokens, 1 - q of the paper, which has no default; a quarter is our choice.

    Source: arXiv:2510.14624; in vLLM and SGLang.
    Differs: a share smaller than the first frame cuts that frame too, while they always keep it.
    """
    return Plan((Step(layers="0", method="evs", keep=Keep(video=Share(keep))),), "evs")
