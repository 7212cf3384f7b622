"""What the attention of one prompt shows, at every layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from fastav.layout import Layout

QUERIES = ("last", "text", "all")
"""Whose attention: the prompt's last token; the text behind the last audio or video token; every token, as a mean."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Rows of the attention maps of one prompt, and of their rollout (`fastav.rollout`).

    attention: of each layer, mean over heads; 0 at tokens that were not there. rollout: of each layer and all before
    it, so that tokens that a plan dropped keep what they passed on before. Both for `QUERIES`. selections: the layers at
    which a plan dropped tokens, and which stayed. seconds: of `prefill` and of `rollout`, which is what the rows cost
    beside it.
    """

    layout: Layout
    attention: Float[np.ndarray, "queries layers tokens"]
    rollout: Float[np.ndarray, "queries layers tokens"]
    selections: tuple[tuple[int, Int[np.ndarray, " _"]], ...]
    seconds: Mapping[str, float]
