"""OmniZip."""

from fastav.plan import Keep, Plan, Share, Step


def omnizip(audio: float | int = 0.7, video: float | int = 0.4, anchors: float | int = 0.05, merged: int = 3) -> Plan:
    """Keep audio by its encoder's attention, and video window by window as the audio determines, before the first
    layer.

    audio: share of audio that stays by attention, 1 - rho_a of the paper. video: share of video that stays, 1 - rho_v.
    anchors: share of audio that also stays, and absorbs dropped tokens. merged: how many tokens an anchor absorbs, G.

    Source: arXiv:2511.14582, CVPR 2026; its setting 0.3 / 0.6 (45 % stay), the other is 0.4 / 0.7.
    Differs: see the method `omnizip`.
    """
    budgets = min(1.0, round(audio + anchors, 6))
    step = Step(
        layers="0",
        method="omnizip",
        options={"audio": budgets, "anchors": anchors, "merged": merged},
        keep=Keep(audio=Share(budgets), video=Share(video)),
    )
    return Plan((step,), "omnizip")
