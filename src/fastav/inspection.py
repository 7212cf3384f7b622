"""What a plan does to one prompt: which tokens every cut drops, by which scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from fastav.flops import Saving
from fastav.layout import Layout
from fastav.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut:
    """One cut of a prefill, as it was made.

    layer: the first layer that does not run on the dropped tokens; of a cut in a cache, the layer whose cache drops
    them. method: by the name that the plan calls it. is_cache_only: whether only the layer's KV cache is cut, and the
    tokens go on. tokens: those that compete for the cut's budgets, by their index in the prompt, in order; text and
    earlier dropped tokens are not among them. scores: of these, higher stays. kept: which of them stay.
    """

    layer: int
    method: str
    is_cache_only: bool
    tokens: Int[np.ndarray, " candidates"]
    scores: Float[np.ndarray, " candidates"]
    kept: Bool[np.ndarray, " candidates"]

    def __repr__(self) -> str:
        where = f"the cache of layer {self.layer}" if self.is_cache_only else f"layer {self.layer}"
        return f"Cut({self.method} at {where}: {int(self.kept.sum()):,} of {len(self.kept):,} tokens stay)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inspection:
    """What a plan does to one prompt.  Made by `Pipeline.inspect`.

    model: the name of the model's family. depth: number of decoder layers. cuts: in order; a cut whose budgets no
    modality exceeds drops nothing, and is left out. texts: the text of each text token, None for others; a token that
    is a part of a character has the empty text, and the last of its tokens has the character. flops, kv_bytes: as in
    `fastav.Answer`.
    """

    model: str
    plan: Plan
    depth: int
    layout: Layout
    cuts: Sequence[Cut]
    texts: Sequence[str | None]
    flops: Saving
    kv_bytes: Saving

    def __repr__(self) -> str:
        plan = self.plan.name or self.plan.fingerprint
        return f"Inspection({self.model!r}, plan={plan!r}, {self.layout}, {len(self.cuts)} cuts)"

    @property
    def layers(self) -> Int[np.ndarray, " tokens"]:
        """How many layers, the first ones, run on each token; all for a token that is never dropped."""
        layers = np.full(len(self.layout), self.depth)
        for cut in self.cuts:
            if not cut.is_cache_only:
                layers[cut.tokens[~cut.kept]] = cut.layer
        return layers
