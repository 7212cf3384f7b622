"""Keeping the beginning, a control."""

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step


def keep_first(keep: float | int = 0.5, layer: int = 2) -> Plan:
    """Keep, once, the beginning of audio and of video.

    Source: ours, a control that does not read the content.
    """
    budgets = Keep(audio=Share(keep), video=Share(keep), image=Share(keep))
    return Plan((Step(layers=str(layer), method="keep-first", keep=budgets),), "keep-first")
