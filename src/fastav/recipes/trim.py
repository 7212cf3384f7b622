"""A plan that drops padding only."""

from fastav import presets
from fastav.plan import Plan


def trim() -> Plan:
    """Drop tokens that are padding by construction, before the first layer.

    Source: ours.
    """
    return presets.trim("trim")
