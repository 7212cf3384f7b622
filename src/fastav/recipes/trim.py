"""Padding goes, and nothing else."""

from fastav import presets
from fastav.plan import Plan


def trim() -> Plan:
    """Before the first layer, tokens that are padding by construction go.

    Source: ours.
    """
    return presets.trim("trim")
