"""A control that keeps the beginning."""

from fastav.plan import Keep, Plan, Share, Step


def keep_first(keep: float | int = 0.5, layer: int = 2) -> Plan:
    """Keep the beginning of audio and of video, once.

    Source: ours, a control that ignores the content.
    """
    budgets = Keep(audio=Share(keep), video=Share(keep), image=Share(keep))
    return Plan((Step(layers=str(layer), method="keep-first", keep=budgets),), "keep-first")
