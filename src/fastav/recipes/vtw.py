"""Visual tokens withdrawal."""

from fastav.budgets import Tokens
from fastav.plan import Keep, Plan, Step


def vtw(layer: int | None = None) -> Plan:
    """Drop all audio and video at one layer.

    layer: None for half the depth; the paper searches for it on about 20 samples, and finds 15 of 32 for LLaVA-1.5-7B.

    Source: arXiv:2405.05803, AAAI 2025.
    Differs: drops audio too, while the paper drops images; does not search for the layer.
    """
    layers = "1/2" if layer is None else str(layer)
    return Plan((Step(layers=layers, method="keep-first", keep=Keep(media=Tokens(0))),), "vtw")
