"""Dropping padding only."""

from fastav import presets
from fastav.plan import Plan


def trim() -> Plan:
    """Drop, before the first layer, tokens that are padding by construction.

    Source: ours.
    """
    return presets.trim("trim")
