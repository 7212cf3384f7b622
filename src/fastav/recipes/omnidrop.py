"""OmniDrop."""

from math import exp

from fastav.plan import Keep, Plan, Share, Step

_LAYERS = 28  # of Qwen2.5-Omni-7B, for which the schedule is written
_STEEP, _MIDDLE = 20.0, 0.5
_LEAST = 0.001  # smaller shares are not worth the cost of their attention


def omnidrop(
    audio: float | int = 0.7,
    video: float | int = 0.4,
    first: float | int = 0.0,
    last: float | int = 0.2,
    diversity: float | int = 0.2,
) -> Plan:
    """Drop the audio and video that the question attends to least, layer by layer, slowly at first and faster in deep
    layers.

    audio, video: the shares that stay before the first layer. first, last: the share dropped per layer at the start and
    at the end, p_init and p_final (0 and 0.2 for 30 % on average, 0.02 and 0.5 for 20 %), with a sigmoid between.
    diversity: weight of distance in time, from half the depth on.

    Source: arXiv:2605.14458. Settings are those of Qwen2.5-Omni-7B, as quoted by a third-party reproduction. Differs:
    before the first layer audio is dropped by DyCoke's similarity in time, where the paper uses the attention of the
    audio encoder, which not every model provides; layers that would drop less than 0.1 % drop nothing; in models with
    another depth than 28 layers the same cuts are spread over the depth.
    """
    budgets = Keep(audio=Share(audio), video=Share(video))
    steps = [Step(layers="0", method="dycoke", keep=budgets)]
    for layer in range(_LAYERS - 1):
        drop = round(first + (last - first) / (1 + exp(-_STEEP * (layer / _LAYERS - _MIDDLE))), 6)
        if drop < _LEAST:
            continue
        deep = layer >= _LAYERS // 2
        steps.append(
            Step(
                layers=f"{layer + 1}/{_LAYERS}",
                method="omnidrop" if deep else "text-queries",
                options={"drop": drop, "diversity": diversity} if deep else {},
                keep=Keep(media=Share(round(1 - drop, 6))),
            )
        )
    return Plan(tuple(steps), "omnidrop")
