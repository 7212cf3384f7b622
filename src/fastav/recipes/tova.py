"""TOVA."""

from fastav.plan import Keep, Plan, Share, Step


def tova(keep: float | int = 0.5) -> Plan:
    """Every layer's cache loses what the last query attends to least; prefill runs on everything.

    Source: arXiv:2401.06104, section 3.
    Differs: once, when the prompt has been read, where it evicts anew for every token that is written; text stays; a
    share, where it keeps a number.
    """
    return Plan((Step(layers="0..", method="last-query", keep=Keep(media=Share(keep)), cache_only=True),), "tova")
