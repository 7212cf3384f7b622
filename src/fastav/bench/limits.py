"""The least time that the machine allows: by the FLOPs of a prefill, and by the bytes that every new token reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastav.adapter import ModelAdapter
from fastav.bench.measure import timed
from fastav.bench.workload import release_memory
from fastav.flops import DecoderShape, kv_bytes, prefill_flops

EXPERT_COUNTS = (  # names in configurations: experts of a layer, and those that one token takes
    ("num_experts", "num_experts_per_tok"),
    ("num_experts", "top_k_experts"),
    ("num_local_experts", "num_experts_per_tok"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast the machine multiplies matrices, in FLOP/s, and copies, in bytes/s (read plus written)."""

    flops: float
    bytes: float


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates now: the best of ten large products, and of ten large copies."""
    side, numbers = (8192, 2**30) if device.type == "cuda" else (1024, 2**24)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(numbers, device=device, dtype=dtype)
    target = torch.zeros_like(source)
    product = min(timed(device, lambda: torch.matmul(a, b))[0] for _ in range(10))
    copy = min(timed(device, lambda: target.copy_(source))[0] for _ in range(10))
    del a, b, source, target
    release_memory()
    return Rates(flops=2 * side**3 / product, bytes=2 * numbers * dtype.itemsize / copy)


def prefill_cost(shape: DecoderShape, tokens: Sequence[int], *, heads: int) -> int:
    """FLOPs of one prompt's prefill, attention counted causally.  heads: tokens that the LM head runs on."""
    return prefill_flops(shape, tokens) + (heads - 1) * 2 * shape.hidden * shape.vocab


def token_cost(shape: DecoderShape, weights: int, cached: Sequence[int], new: int, itemsize: int, batch: int) -> int:
    """Bytes that one step reads: the weights once, and the keys and values of every row.

    cached: tokens of the prompt in each layer's cache. new: tokens of the whole answer, of which the cache holds half
    on average.
    """
    return weights + batch * kv_bytes(shape, [n + new // 2 for n in cached], itemsize)


def weights_read(model: PreTrainedModel, adapter: ModelAdapter) -> int | None:
    """Bytes of the weights that decoding a token reads: the decoder's layers and the head.

    Of experts, the active ones, as if all rows of a batch chose the same; None if the configuration does not say how
    many are active.
    """
    decoder: Any = adapter.decoder(model)
    total = sum(weight.nbytes for weight in _head(model).parameters())
    active = _active_share(decoder.config)
    for name, weight in decoder.layers.named_parameters():
        if ".experts." not in name:
            total += weight.nbytes
        elif active is None:
            return None
        else:
            total += round(active * weight.nbytes)
    return total


def _head(model: PreTrainedModel) -> nn.Module:
    head: Any = model.get_output_embeddings() or model.get_submodule("lm_head")
    return head


def _active_share(config: Any) -> float | None:
    """Active experts over all experts of a layer; None if the configuration does not say."""
    for every, active in EXPERT_COUNTS:
        if getattr(config, every, None) and getattr(config, active, None):
            return getattr(config, active) / getattr(config, every)
    return None
