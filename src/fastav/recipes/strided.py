"""Even spacing, a control."""

from fastav.plan import Keep, Plan, Share, Step


def strided(keep: float | int = 0.5, layer: int = 2) -> Plan:
    """Evenly spread tokens of audio and of video stay, once.

    Source: ours, a control that looks at nothing.
    """
    budgets = Keep(audio=Share(keep), video=Share(keep), image=Share(keep))
    return Plan((Step(layers=str(layer), method="strided", keep=budgets),), "strided")
