"""SnapKV."""

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step


def snapkv(keep: float | int = 0.5) -> Plan:
    """Drop, from every layer's cache, tokens that the prompt's last queries attend to least; prefill runs on all.

    Source: arXiv:2404.14469, section 4.
    Differs: one choice for all heads of a layer; text is kept, and so is the window; keeps a share, not a number.
    """
    return Plan((Step(layers="0..", method="window", keep=Keep(media=Share(keep)), cache_only=True),), "snapkv")
