"""DyCoke on video and audio."""

from fastav.plan import Keep, Plan, Share, Step


def dycoke(keep: float | int = 0.475) -> Plan:
    """Drop video and audio that repeats an earlier frame, in groups of four frames, before the first layer.

    keep: of video and of audio, (1 + 3 (1 - K)) / 4 of the paper's ratio K, 0.7.

    Source: arXiv:2411.15024, CVPR 2025; called "DyCoke (V&A)" in papers on omni models.
    Differs: without its pruning of the KV cache while decoding; see the method `dycoke`.
    """
    budgets = Keep(audio=Share(keep), video=Share(keep))
    return Plan((Step(layers="0", method="dycoke", keep=budgets),), "dycoke")
