"""SnapKV."""

from fastav.plan import Keep, Plan, Share, Step


def snapkv(keep: float | int = 0.5) -> Plan:
    """Drop what the prompt's last queries do not attend to from every layer's cache; the prefill runs on all tokens.

    Source: arXiv:2404.14469, section 4.
    Differs: one choice for all heads of a layer; text stays, and so does the window; a share, where the paper keeps a
    number.
    """
    return Plan((Step(layers="0..", method="window", keep=Keep(media=Share(keep)), cache_only=True),), "snapkv")
