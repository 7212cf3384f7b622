"""A control that keeps evenly spaced tokens."""

from fastav.plan import Keep, Plan, Share, Step


def strided(keep: float | int = 0.5, layer: int = 2) -> Plan:
    """Keep evenly spaced tokens of audio and of video, once.

    Source: ours, a control that ignores the content.
    """
    budgets = Keep(audio=Share(keep), video=Share(keep), image=Share(keep))
    return Plan((Step(layers=str(layer), method="strided", keep=budgets),), "strided")
