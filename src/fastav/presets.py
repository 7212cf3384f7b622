"""Plans that several models share."""

from fastav.budgets import Share, Unpadded
from fastav.errors import PlanError
from fastav.plan import Keep, Plan, Step

NONE = Plan(name="none")


def fastav(
    keep: Keep, *, start: int | str = "middle", drop: float | int = 0.2, exempt_text: bool = True, name: str = "fastav"
) -> Plan:
    """FastAV: a global cut by position at the middle layer, then a fine cut at every later layer.

    keep: the budgets of the global cut (in the paper `Keep(audio=Tokens(10))` for VideoLLaMA2 and
    `Keep(media=Frames(4))` for video-SALMONN 2, which the paper also words as `Keep(media=Before(750))`). The earliest
    tokens of each budget stay. If `keep` names `clip`, images beside the clip have a budget of their own: they have no
    place in time, so all stay at the global cut, and every fine cut drops the same share P of them. start: the layer of
    the global cut, `"middle"` or a number. drop: the share P of the remaining tokens that every fine cut drops.
    exempt_text: whether the fine cuts keep all text. The paper does not say; without it the question would not survive.

    Source: arXiv:2601.13143. Reproduces its FLOPs column; see `fastav flops`.
    Raises: PlanError.
    """
    if not isinstance(drop, int | float) or not 0 <= drop < 1:
        raise PlanError(f"drop must be in [0, 1), got {drop}")
    if start != "middle" and not str(start).isdecimal():
        raise PlanError(f"start must be a layer number or 'middle', got {start!r}")
    steps = [Step(layers=str(start), method="position", keep=keep)]
    if drop:
        share = Share(round(1 - drop, 12))
        media = Keep(media=share) if keep.clip is None else Keep(clip=share, image=share)
        fine = media if exempt_text else Keep(all=share)
        steps.append(Step(layers=f"{start}+1..", method="last-query", keep=fine))
    return Plan(tuple(steps), name)


def trim(name: str = "fastav-trim") -> Plan:
    """Drop the tokens that are padding by construction, before the first layer.

    Ours: the paper keeps them until the middle layer. Nothing is dropped if the layout does not know the padding (a
    prompt without the processor's feature mask). The result is not bit-identical to the unpruned model, because
    attention also reads padding; the dropped tokens have no content of the clip.
    """
    keep = Keep(audio=Unpadded(), video=Unpadded(), image=Unpadded())
    return Plan((Step(layers="0", method="unpadded", keep=keep),), name)


def plus() -> Plan:
    """FastAV-plus: drop half of the tokens that repeat in time, before the first layer.

    It is the plan with the best answers at 60 % of the FLOPs or less. Half of the audio, of the video and of the images
    stays, by DyCoke's similarity of tokens to those of earlier moments (`dycoke`, arXiv:2411.15024). No attention is
    computed for it, and no modality is dropped entirely. The evidence is from the embedded model alone, whose clips are
    mostly still and silent; docs/tiny.md has it and its limits.
    """
    half = Keep(audio=Share(0.5), video=Share(0.5), image=Share(0.5))
    return Plan((Step(layers="0", method="dycoke", keep=half),), "fastav-plus")
