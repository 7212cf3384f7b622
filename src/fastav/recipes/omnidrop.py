"""OmniDrop."""

from math import exp

from fastav.plan import Keep, Plan, Share, Step

_LAYERS = 28  # of Qwen2.5-Omni-7B, in whose layers the schedule is written
_STEEP, _MIDDLE = 20.0, 0.5
_LEAST = 0.001  # a smaller share than this is not worth the attention it needs


def omnidrop(
    audio: float | int = 0.7,
    video: float | int = 0.4,
    first: float | int = 0.0,
    last: float | int = 0.2,
    diversity: float | int = 0.2,
) -> Plan:
    """Layer by layer, audio and video that the question attends to least goes, slowly at first, faster when deep.

    audio, video: what stays before the first layer. first, last: the share that goes per layer, p_init and p_final
    (0 and 0.2 for 30 % on average, 0.02 and 0.5 for 20 %), with a sigmoid between. diversity: weight of distance in
    time, from half the depth on.

    Source: arXiv:2605.14458.
    Settings are those of Qwen2.5-Omni-7B, as a third-party reproduction quotes them.
    Differs: before the first layer audio goes by DyCoke's likeness in time, where the paper asks the audio encoder's
    attention, which not every model tells; layers that would drop less than 0.1 % drop nothing; in models of another
    depth than 28 layers the same cuts are spread over it.
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
