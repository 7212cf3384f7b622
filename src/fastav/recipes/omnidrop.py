"""OmniDrop."""

from math import exp

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step

_LAYERS = 28  # of Qwen2.5-Omni-7B, for which the schedule is written
_STEEPNESS, _MIDDLE = 20.0, 0.5
_MIN_DROP = 0.001  # a smaller share is not worth the attention that it needs


def omnidrop(
    audio: float | int = 0.7,
    video: float | int = 0.4,
    first: float | int = 0.0,
    last: float | int = 0.2,
    diversity: float | int = 0.2,
) -> Plan:
    """Drop, layer by layer, audio and video that the question attends to least: few at first, more in deep layers.

    audio, video: shares to keep before the first layer. first, last: shares to drop per layer, p_init and p_final (0
    and 0.2 for 30 % on average, 0.02 and 0.5 for 20 %), with a sigmoid between them. diversity: weight of distance in
    time, from half the depth on.

    Source: arXiv:2605.14458.
    Settings are those of Qwen2.5-Omni-7B, as quoted by a third-party reproduction.
    Differs: before the first layer audio is dropped by DyCoke's similarity in time, while the paper uses the audio
    encoder's attention, which not every model provides; layers that would drop less than 0.1 % drop nothing; models of
    another depth than 28 layers get the same cuts, spread over their depth.
    """
    steps = [Step(layers="0", method="dycoke", keep=Keep(audio=Share(audio), video=Share(video)))]
    for layer in range(_LAYERS - 1):
        drop = round(first + (last - first) / (1 + exp(-_STEEPNESS * (layer / _LAYERS - _MIDDLE))), 6)
        if drop < _MIN_DROP:
            continue
        is_deep = layer >= _LAYERS // 2
        steps.append(
            Step(
                layers=f"{layer + 1}/{_LAYERS}",
                method="omnidrop" if is_deep else "text-queries",
                options={"drop": drop, "diversity": diversity} if is_deep else {},
                keep=Keep(media=Share(round(1 - drop, 6))),
            )
        )
    return Plan(tuple(steps), "omnidrop")
