"""Plans that several models share, with their settings."""

from collections.abc import Sequence

from fastav.errors import PlanError
from fastav.plan import Keep, Plan, Share, Step, Unpadded

NONE = Plan(name="none")


def fastav(
    keep: Keep, *, start: int | str = "middle", drop: float | int = 0.2, exempt_text: bool = True, name: str = "fastav"
) -> Plan:
    """FastAV: one global cut by position entering the middle layer, then a fine one after every later layer.

    keep: what stays at the global cut (the paper: `Keep(audio=Tokens(10))` for VideoLLaMA2, `Keep(media=Frames(4))` for
    video-SALMONN 2; `Keep(media=Before(750))` is its other wording). Of each budget the earliest tokens stay.
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
        fine = Keep(media=share) if exempt_text else Keep(all=share)
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


def plus(layers: Sequence[str] = ("1/4", "middle", "3/4")) -> Plan:
    """Ours: three cuts by what the whole question needs, each with a quota for each modality.

    layers: where the cuts are made. Of audio, video and images each, 60 %, half and half of what is left stay: what the
    question's queries attend to (`text-queries`), in the middle what reaches the last query through all layers so far
    (`rollout`).

    One last query knows the answer's first word only, so what longer answers need may go; and where audio and video
    compete, one of them may go whole. Evidence and limits: docs/tiny.md, on the embedded model alone. FLOPs leave out
    the rollout itself, which computes the attention scores of the layers before the middle once more.
    """
    cuts = zip(layers, ("text-queries", "rollout", "text-queries"), (0.6, 0.5, 0.5), strict=True)
    steps = (
        Step(layers=layer, method=method, keep=Keep(audio=Share(share), video=Share(share), image=Share(share)))
        for layer, method, share in cuts
    )
    return Plan(tuple(steps), "fastav-plus")
