"""Efficient Video Sampling."""

from fastav.plan import Keep, Plan, Share, Step


def evs(keep: float | int = 0.25) -> Plan:
    """Before the first layer, video that repeats the frame before goes; audio stays whole.

    keep: 1 - q of video tokens, a quarter by our choice: it is a setting of the paper, without one default.

    Source: arXiv:2510.14624; in vLLM and SGLang.
    Differs: a share smaller than the first frame cuts that frame too, which they keep whole.
    """
    return Plan((Step(layers="0", method="evs", keep=Keep(video=Share(keep))),), "evs")
