"""DART."""

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step


def dart(keep: float | int = 0.222, layer: int = 2) -> Plan:
    """Drop, once, after the first layers, tokens that are similar to a few pivots.

    keep: 1 - the paper's reduction ratio, for which it reports 0.667, 0.778 and 0.889.

    Source: arXiv:2502.11494, EMNLP 2025.
    Differs: audio and video each keep this share, while the paper prunes images; see the method `dart`.
    """
    budgets = Keep(audio=Share(keep), video=Share(keep), image=Share(keep))
    return Plan((Step(layers=str(layer), method="dart", keep=budgets),), "dart")
