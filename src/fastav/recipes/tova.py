"""TOVA."""

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step


def tova(keep: float | int = 0.5) -> Plan:
    """Drop, from every layer's cache, tokens that the last query attends to least; prefill runs on all.

    Source: arXiv:2401.06104, section 3.
    Differs: drops once, after the prefill, while the paper evicts at every generated token; text is kept; keeps a
    share, not a number.
    """
    return Plan((Step(layers="0..", method="last-query", keep=Keep(media=Share(keep)), cache_only=True),), "tova")
