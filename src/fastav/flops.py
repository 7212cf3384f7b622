"""FLOPs of a prefill and bytes of its KV cache, from the decoder's shape and the tokens of every layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastav.errors import PlanError


@dataclass(frozen=True, slots=True)
class Saving:
    """A cost without and with pruning."""

    full: int
    pruned: int

    @property
    def ratio(self) -> float:
        """The cost with pruning over the cost without."""
        return self.pruned / self.full

    def to_dict(self) -> dict[str, Any]:
        """The cost as a JSON object."""
        return {"full": self.full, "pruned": self.pruned, "ratio": self.ratio}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """The dimensions of one decoder layer that can differ between layers.

    own_values: whether values are computed; otherwise they are the keys before their norm and RoPE. The cache stores
    both in either case.

    Raises: PlanError if a dimension is not positive.
    """

    intermediate: int
    kv_heads: int
    head_dim: int
    own_values: bool = True

    def __post_init__(self) -> None:
        _require_positive("a layer's", self, ("intermediate", "kv_heads", "head_dim"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The dimensions of a decoder with grouped-query attention and a gated (SwiGLU) MLP.

    intermediate: in a mixture of experts, the width that is active for one token. windows: the number of keys that a
    query sees in each layer, including its own; 0 for all (empty: all keys in every layer). kv_layers: the number of
    first layers with keys and values of their own (None: all); later layers reuse those. by_layer: the dimensions of
    every layer, if they differ (empty: all layers have the intermediate, kv_heads and head_dim above).

    Raises: PlanError if a dimension is not positive, or if the number of windows or shapes is not that of the layers.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    windows: tuple[int, ...] = ()
    kv_layers: int | None = None
    by_layer: tuple[LayerShape, ...] = ()

    def __post_init__(self) -> None:
        names = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab")
        _require_positive("a decoder's", self, names)
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise PlanError(f"a decoder of {self.layers} layers needs as many windows, got {list(self.windows)}")
        if self.kv_layers is not None and not 0 < self.kv_layers <= self.layers:
            raise PlanError(f"kv_layers={self.kv_layers} does not fit a decoder of {self.layers} layers")
        if self.by_layer and len(self.by_layer) != self.layers:
            raise PlanError(f"a decoder of {self.layers} layers needs as many shapes, got {len(self.by_layer)}")

    def layer(self, index: int) -> LayerShape:
        """The dimensions of one layer."""
        if self.by_layer:
            return self.by_layer[index]
        return LayerShape(intermediate=self.intermediate, kv_heads=self.kv_heads, head_dim=self.head_dim)

    def cached_tokens(self, index: int, tokens: int) -> int:
        """The tokens that a layer's cache has after a prefill of `tokens` tokens: those that later queries can see."""
        if index >= self.own_kv_layers:
            return 0
        window = self.windows[index] if self.windows else 0
        return min(tokens, window - 1) if window > 1 else tokens

    @property
    def own_kv_layers(self) -> int:
        """The number of layers with keys and values of their own."""
        return self.layers if self.kv_layers is None else self.kv_layers


def paper_flops(shape: DecoderShape, tokens: Sequence[int]) -> int:
    """The formula of FastV and FastAV: the sum over layers of 4nd^2 + 2n^2d + 2ndm.

    It counts multiply-accumulates of a plain transformer, without GQA, SwiGLU or causality. The paper's tables show its
    ratios.

    Source: arXiv:2601.13143, table 1; arXiv:2403.06764, section 4.
    """
    d = shape.hidden
    widths = [shape.layer(index).intermediate for index in range(shape.layers)]
    return sum(4 * n * d * d + 2 * n * n * d + 2 * n * d * m for n, m in zip(tokens, widths, strict=True))


def prefill_flops(shape: DecoderShape, tokens: Sequence[int], *, causal: bool = True) -> int:
    """Floating-point operations of one prompt's prefill: projections, attention, MLP, and the LM head on one token.

    A multiply-add counts as two. Norms, activations, RoPE and the scoring row are left out (together under 1 %), and so
    are the projections that methods on the layer about to run compute once more (docs/methods.md).
    causal: count only the attention scores that a causal kernel computes; False counts the full square, as
    `torch.utils.flop_counter` does. In a layer with a window of w, a query counts with at most w kept tokens, as if the
    kept tokens were adjacent.
    """
    d = shape.hidden
    total = 2 * d * shape.vocab
    for index, n in enumerate(tokens):
        layer = shape.layer(index)
        attention = shape.heads * layer.head_dim
        kv_width = (
            (2 if layer.own_values else 1) * layer.kv_heads * layer.head_dim if index < shape.own_kv_layers else 0
        )
        projections = 2 * d * (2 * attention + kv_width)
        mlp = 2 * 3 * d * layer.intermediate
        window = shape.windows[index] if shape.windows else 0
        pairs = _causal_pairs(n, window) if causal else n * n
        total += n * (projections + mlp) + 4 * attention * pairs
    return total


def _causal_pairs(tokens: int, window: int) -> int:
    """Pairs of a query and a key at or before it, with at most `window` keys per query (0: no limit)."""
    early = tokens if not window else min(tokens, window)
    return early * (early + 1) // 2 + (tokens - early) * window


def kv_bytes(shape: DecoderShape, tokens: Sequence[int], itemsize: int = 2) -> int:
    """Bytes of keys and values in the cache after a prefill, given the tokens of every layer.

    Only the prompt's own tokens count, not the padding of shorter rows in a batch. A layer with a window of w stores at
    most w - 1 tokens, which are all that the next query sees besides itself. Layers that reuse another layer's keys
    store none. itemsize: bytes per number (2 for bfloat16).
    """
    total = 0
    for index, n in enumerate(tokens):
        layer = shape.layer(index)
        total += 2 * layer.kv_heads * layer.head_dim * shape.cached_tokens(index, n) * itemsize
    return total


def _require_positive(whose: str, shape: "LayerShape | DecoderShape", names: Sequence[str]) -> None:
    for name in names:
        if getattr(shape, name) <= 0:
            raise PlanError(f"{whose} {name} must be positive, got {getattr(shape, name)}")
