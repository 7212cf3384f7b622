"""DyCoke on video and audio."""

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step


def dycoke(keep: float | int = 0.475) -> Plan:
    """Drop, before the first layer, video and audio that repeats an earlier frame, in groups of four frames.

    keep: share of video and of audio, (1 + 3 (1 - K)) / 4 for the paper's ratio K = 0.7.

    Source: arXiv:2411.15024, CVPR 2025; "DyCoke (V&A)" of papers on omni models.
    Differs: does not prune the KV cache while decoding; see the method `dycoke`.
    """
    budgets = Keep(audio=Share(keep), video=Share(keep))
    return Plan((Step(layers="0", method="dycoke", keep=budgets),), "dycoke")
