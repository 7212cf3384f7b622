"""TOVA."""

from fastav.plan import Keep, Plan, Share, Step


def tova(keep: float | int = 0.5) -> Plan:
    """Drop what the last query attends to least from every layer's cache; the prefill runs on all tokens.

    Source: arXiv:2401.06104, section 3. Differs: drops once, after the prompt, where the paper evicts for every new
    token; text stays; a share, where the paper keeps a number.
    """
    return Plan((Step(layers="0..", method="last-query", keep=Keep(media=Share(keep)), cache_only=True),), "tova")
