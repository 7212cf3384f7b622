"""Plans that several models share, with their settings."""

from fastav.errors import PlanError
from fastav.plan import Keep, Plan, Share, Step, Unpadded

NONE = Plan(name="none")


def fastav(
    keep: Keep, *, start: int | str = "middle", drop: float | int = 0.2, exempt_text: bool = True, name: str = "fastav"
) -> Plan:
    """FastAV: one global cut by position entering the middle layer, then a fine one after every later layer.

    keep: what stays at the global cut (the paper: `Keep(audio=Tokens(10))` for VideoLLaMA2, `Keep(media=Frames(4))` for
    video-SALMONN 2; `Keep(media=Before(750))` is its other wording). Of each budget the earliest tokens stay. Where it
    names `clip`, images beside the clip have a budget of their own: no place in time, so that all stay at this cut, and
    the same share P of them goes at every fine one.
    start: the layer of the global cut, `"middle"` or a number. drop: share P of what remains that every fine cut drops.
    exempt_text: whether the fine cuts spare text (the paper does not say; it must for the question to survive).

    Source: arXiv:2601.13143. Reproduces its FLOPs column; see `fastav flops`.
    Raises: PlanError.
    """
    if not isinstance(drop, int | float) or not 0 <= drop < 1:
        raise PlanError(f"drop must be in [0, 1), got {drop}")
    if start != "middle" and not str(start).isdecimal():
        raise PlanError(f"start must be a layer's number or 'middle', got {start!r}")
    steps = [Step(layers=str(start), method="position", keep=keep)]
    if drop:
        share = Share(round(1 - drop, 12))
        media = Keep(media=share) if keep.clip is None else Keep(clip=share, image=share)
        fine = media if exempt_text else Keep(all=share)
        steps.append(Step(layers=f"{start}+1..", method="last-query", keep=fine))
    return Plan(tuple(steps), name)


def trim(name: str = "fastav-trim") -> Plan:
    """Drop, before the first layer, the tokens that are padding by construction.

    Ours: the paper keeps them until the middle layer. Where a layout does not say what is padding (a prompt without the
    processor's feature mask), nothing goes. Not bit-identical to the unpruned model, since attention also
    reads padding; what is dropped carries no content of the clip.
    """
    keep = Keep(audio=Unpadded(), video=Unpadded(), image=Unpadded())
    return Plan((Step(layers="0", method="unpadded", keep=keep),), name)


def plus() -> Plan:
    """What kept answers best at 60 % of the FLOPs or less: half of what repeats in time goes before the first layer.

    Of audio, of video and of images each, half stays, by DyCoke's likeness of tokens to those of earlier moments
    (`dycoke`, arXiv:2411.15024); no attention is asked, no modality can go whole. Evidence and limits: docs/tiny.md,
    on the embedded model alone, whose clips are mostly still and silent.
    """
    half = Keep(audio=Share(0.5), video=Share(0.5), image=Share(0.5))
    return Plan((Step(layers="0", method="dycoke", keep=half),), "fastav-plus")
