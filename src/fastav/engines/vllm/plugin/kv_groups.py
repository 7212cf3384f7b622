"""Into how many parts of as many layers a cache is best divided, if each part holds what its first layer holds."""

from collections.abc import Sequence

MOST = 4  # parts: each costs a table of blocks and attention metadata of its own in every step


def parts(held: Sequence[int], most: int = MOST) -> tuple[int, ...]:
    """The first layers of the parts that hold a prompt in the fewest slots; of equal ones the fewest parts.

    held: tokens of the prompt that each layer keeps, which never grow from layer to layer.
    """
    divisions = [range(0, len(held), len(held) // count) for count in range(1, most + 1) if len(held) % count == 0]
    return tuple(min(divisions, key=lambda firsts: sum(held[first] for first in firsts) * firsts.step))
