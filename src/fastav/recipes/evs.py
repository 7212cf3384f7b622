"""Efficient Video Sampling."""

from fastav.plan import Keep, Plan, Share, Step


def evs(keep: float | int = 0.25) -> Plan:
    """Drop video that repeats the previous frame, before the first layer; all audio stays.

    keep: 1 - q of video tokens. The default of a quarter is our choice; the paper has no single default.

    Source: arXiv:2510.14624; in vLLM and SGLang.
    Differs: a share smaller than the first frame also cuts that frame, which they keep whole.
    """
    return Plan((Step(layers="0", method="evs", keep=Keep(video=Share(keep))),), "evs")
