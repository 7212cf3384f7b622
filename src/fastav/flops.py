"""FLOPs of a prefill and bytes of its KV cache, from the decoder's shape and the tokens of every layer alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastav.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The dimensions of a decoder with grouped-query attention and a gated (SwiGLU) MLP.

    intermediate: of a mixture of experts, what is active for one token. windows: how many keys a query sees in each
    layer, 0 for all (empty: all in every layer). kv_layers: how many layers, the first ones, have keys and values of
    their own (None: all); later ones read theirs.

    Raises: PlanError if a dimension is not positive, or there is not one window for each layer.
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

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab"):
            if getattr(self, name) <= 0:
                raise PlanError(f"a decoder's {name} must be positive, got {getattr(self, name)}")
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise PlanError(f"a decoder of {self.layers} layers needs as many windows, got {list(self.windows)}")
        if self.kv_layers is not None and not 0 < self.kv_layers <= self.layers:
            raise PlanError(f"of {self.layers} layers, {self.kv_layers} cannot have keys and values")

    @property
    def owners(self) -> int:
        """How many layers have keys and values of their own."""
        return self.layers if self.kv_layers is None else self.kv_layers


def paper_flops(shape: DecoderShape, tokens: Sequence[int]) -> int:
    """The formula of FastV and FastAV: the sum over layers of 4nd^2 + 2n^2d + 2ndm.

    It counts multiply-accumulates of a plain transformer: neither GQA, SwiGLU nor causality. Its ratios are what the
    paper's tables show.

    Source: arXiv:2601.13143, table 1; arXiv:2403.06764, section 4.
    """
    d, m = shape.hidden, shape.intermediate
    return sum(4 * n * d * d + 2 * n * n * d + 2 * n * d * m for n in tokens)


def prefill_flops(shape: DecoderShape, tokens: Sequence[int], *, causal: bool = True) -> int:
    """Floating-point operations of one prompt's prefill: projections, attention, MLP, and the LM head on one token.

    A multiply-add counts two. Norms, activations, RoPE and the scoring row are left out (under 1 % together).
    causal: count only the attention scores that a causal kernel needs; False counts the full square, as
    `torch.utils.flop_counter` does. In a layer with a window of w a query is counted with w kept tokens at most, as if
    the kept tokens were neighbours.
    """
    d, attention = shape.hidden, shape.heads * shape.head_dim
    mlp = 2 * 3 * d * shape.intermediate
    total = 2 * d * shape.vocab
    for layer, n in enumerate(tokens):
        keys_values = 2 * shape.kv_heads * shape.head_dim if layer < shape.owners else 0
        projections = 2 * d * (2 * attention + keys_values)
        window = shape.windows[layer] if shape.windows else 0
        pairs = _causal_pairs(n, window) if causal else n * n
        total += n * (projections + mlp) + 4 * attention * pairs
    return total


def _causal_pairs(tokens: int, window: int) -> int:
    """Pairs of a query and a key before or at it, at most `window` keys a query (0: no limit)."""
    early = tokens if not window else min(tokens, window)
    return early * (early + 1) // 2 + (tokens - early) * window


def kv_bytes(shape: DecoderShape, tokens: Sequence[int], itemsize: int = 2) -> int:
    """Bytes of keys and values that hold these tokens of every layer.  itemsize: bytes a number (2 for bfloat16)."""
    windows = shape.windows or (0,) * shape.layers
    held = (min(n, window) if window else n for n, window in zip(tokens, windows, strict=True))
    return sum(2 * shape.kv_heads * shape.head_dim * n * itemsize for n in list(held)[: shape.owners])
