"""OmniZip."""

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step


def omnizip(audio: float | int = 0.7, video: float | int = 0.4, anchors: float | int = 0.05, merged: int = 3) -> Plan:
    """Drop, before the first layer, audio by its encoder's attention, and video in proportion to the audio.

    audio: share of audio to keep by attention, 1 - rho_a of the paper. video: share of video to keep, 1 - rho_v.
    anchors: further share of audio to keep, into which dropped audio is merged. merged: number of tokens to merge into
    an anchor, G.

    Source: arXiv:2511.14582, CVPR 2026; the paper's setting 0.3 / 0.6 (45 % kept); its other setting is 0.4 / 0.7.
    Differs: see the method `omnizip`.
    """
    total_audio = min(1.0, round(audio + anchors, 6))
    step = Step(
        layers="0",
        method="omnizip",
        options={"audio": total_audio, "anchors": anchors, "merged": merged},
        keep=Keep(audio=Share(total_audio), video=Share(video)),
    )
    return Plan((step,), "omnizip")
