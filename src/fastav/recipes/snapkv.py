"""SnapKV."""

from fastav.plan import Keep, Plan, Share, Step


def snapkv(keep: float | int = 0.5) -> Plan:
    """Every layer's cache loses what the prompt's last queries do not attend to; prefill runs on everything.

    Source: arXiv:2404.14469, section 4.
    Differs: one choice for all heads of a layer; text stays, so the window does too; a share, where it keeps a number.
    """
    return Plan((Step(layers="0..", method="window", keep=Keep(media=Share(keep)), cache_only=True),), "snapkv")
