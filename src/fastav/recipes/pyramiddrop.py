"""PyramidDrop."""

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step


def pyramiddrop(keep: float | int = 0.5) -> Plan:
    """Keep, at every quarter of the depth, the same share of the remaining tokens, by the last token's attention.

    keep: share of the remaining tokens, at each of the three stages.

    Source: arXiv:2410.17247, CVPR 2025.
    Differs: audio and video compete, while the paper prunes images; its stages 8, 16 and 24 of 32 layers are quarters.
    """
    stages = ("1/4", "1/2", "3/4")
    budgets = Keep(media=Share(keep))
    return Plan(tuple(Step(layers=stage, method="last-query", keep=budgets) for stage in stages), "pyramiddrop")
