"""DivPrune."""

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step


def divprune(keep: float | int = 0.098, layer: int = 0) -> Plan:
    """Keep, before the first layer, tokens that are far from each other.

    Source: arXiv:2503.02175, CVPR 2025.
    Differs: audio and video each keep this share, while the paper prunes images; see the method `divprune`.
    """
    budgets = Keep(audio=Share(keep), video=Share(keep), image=Share(keep))
    return Plan((Step(layers=str(layer), method="divprune", keep=budgets),), "divprune")
