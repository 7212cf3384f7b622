"""FastV."""

from fastav.plan import Keep, Plan, Share, Step


def fastv(keep: float | int = 0.5, layer: int = 2) -> Plan:
    """Drop the audio and video that the last token attends to least, once, after the first layers.

    keep: 1 - R of the paper. layer: its K.

    Source: arXiv:2403.06764, ECCV 2024.
    Differs: audio and video compete, where the paper prunes images; the last query scores, as in its code.
    """
    return Plan((Step(layers=str(layer), method="last-query", keep=Keep(media=Share(keep))),), "fastv")
