"""VidCom2."""

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step


def vidcom2(keep: float | int = 0.25) -> Plan:
    """Drop, before the first layer, video that is similar to its frame and to the entire video; keep all audio.

    Source: arXiv:2505.14454, EMNLP 2025; in vLLM.
    Differs: see the method `vidcom2`.
    """
    return Plan((Step(layers="0", method="vidcom2", keep=Keep(video=Share(keep))),), "vidcom2")
