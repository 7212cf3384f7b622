"""Random choice, the control."""

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step


def random(keep: float | int = 0.5, layer: int = 2, seed: int = 0) -> Plan:
    """Keep, once, randomly chosen audio and video.

    Source: the control of most papers on pruning.
    Differs: audio and video each keep this share.
    """
    budgets = Keep(audio=Share(keep), video=Share(keep), image=Share(keep))
    return Plan((Step(layers=str(layer), method="random", options={"seed": seed}, keep=budgets),), "random")
