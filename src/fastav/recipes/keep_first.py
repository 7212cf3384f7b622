"""The beginning, a control."""

from fastav.plan import Keep, Plan, Share, Step


def keep_first(keep: float | int = 0.5, layer: int = 2) -> Plan:
    """The beginning of audio and of video stays, once.

    Source: ours, a control that looks at nothing.
    """
    budgets = Keep(audio=Share(keep), video=Share(keep), image=Share(keep))
    return Plan((Step(layers=str(layer), method="keep-first", keep=budgets),), "keep-first")
