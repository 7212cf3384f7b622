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
    """Rows of the attention maps of one prompt, and of their rollout (`fastav.pruning.rollout`).

    attention: of each layer, mean over heads; 0 at tokens that were dropped before. rollout: of each layer and all
    before it; dropped tokens keep what they passed on until then. Both for `QUERIES`. selections: the layers with cuts,
    and the tokens that stayed. seconds: of `prefill` and of `rollout`, the extra time for the rows.
    """

    layout: Layout
    attention: Float[np.ndarray, "queries layers tokens"]
    rollout: Float[np.ndarray, "queries layers tokens"]
    selections: tuple[tuple[int, Int[np.ndarray, " _"]], ...]
    seconds: Mapping[str, float]
