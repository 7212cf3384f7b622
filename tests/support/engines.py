"""What every engine must say of a plan for a model."""

from contextlib import suppress

from fastav.errors import UnsupportedModel
from fastav.registry import ENGINES


def accepted(config, plan):
    """The names of engines that take a plan for a model; the others say that they do not know the model."""
    names = set()
    for name, engine in ENGINES.items():
        with suppress(UnsupportedModel):
            engine.check(config, plan)
            names.add(name)
    return names
