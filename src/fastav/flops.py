"""FLOPs of a prefill and bytes of its KV cache, from the decoder's shape and the tokens of every layer alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastav.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The dimensions of a decoder with grouped-query attention and a gated (SwiGLU) MLP.

    Raises: PlanError if a dimension is not positive.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise PlanError(f"a decoder's {name} must be positive, got {getattr(self, name)}")


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
    `torch.utils.flop_counter` does.
    """
    d, attention = shape.hidden, shape.heads * shape.head_dim
    projections = 2 * d * (2 * attention + 2 * shape.kv_heads * shape.head_dim)
    mlp = 2 * 3 * d * shape.intermediate
    pairs = [n * (n + 1) // 2 if causal else n * n for n in tokens]
    return sum(n * (projections + mlp) + 4 * attention * p for n, p in zip(tokens, pairs, strict=True)) + (
        2 * d * shape.vocab
    )


def kv_bytes(shape: DecoderShape, tokens: Sequence[int], itemsize: int = 2) -> int:
    """Bytes of keys and values that hold these tokens of every layer.  itemsize: bytes a number (2 for bfloat16)."""
    return sum(2 * shape.kv_heads * shape.head_dim * n * itemsize for n in tokens)
