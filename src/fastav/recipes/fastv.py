"""FastV."""

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step


def fastv(keep: float | int = 0.5, layer: int = 2) -> Plan:
    """Drop, once, after the first layers, audio and video that the last token attends to least.

    keep: 1 - R of the paper. layer: K of the paper.

    Source: arXiv:2403.06764, ECCV 2024.
    Differs: audio and video compete, while the paper prunes images; the last query scores, as in the paper's code.
    """
    return Plan((Step(layers=str(layer), method="last-query", keep=Keep(media=Share(keep))),), "fastv")
