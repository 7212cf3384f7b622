"""Attention and rollout of one prompt, at every layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from fastav.layout import Layout

QUERIES = ("last", "text", "all")
"""Queries: the prompt's last token; the text after the last audio or video token (mean); all tokens (mean)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Rows of the attention maps of one prompt, and of their rollout (`fastav.rollout`), for `QUERIES`.

    attention: of each layer, the mean over heads; 0 for tokens that were dropped before. rollout: through each layer
    and all layers before it; a dropped token keeps the rollout that it had passed on. selections: pairs of a layer at
    which a plan dropped tokens, and the indices of the tokens that stayed. seconds: of `prefill`, and of `rollout`, the
    extra cost of these rows.
    """

    layout: Layout
    attention: Float[np.ndarray, "queries layers tokens"]
    rollout: Float[np.ndarray, "queries layers tokens"]
    selections: tuple[tuple[int, Int[np.ndarray, " _"]], ...]
    seconds: Mapping[str, float]
