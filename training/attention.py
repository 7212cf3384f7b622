"""Attention for training in plain operations: on CPUs, the backward pass of PyTorch's sdpa takes twice as long."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "written-out"
HIDDEN = -1e4  # added to a masked score; finite in bfloat16


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Compute attention with the signature that transformers calls.

    query: [batch, heads, tokens, channels]; keys and values may have fewer heads. mask: [batch, 1, rows, tokens], added
    to the scores of the last rows; the rows before them are causal.
    """
    shared = query.shape[1] // key.shape[1]
    query = query * scaling
    if mask is None:
        return _weighted(query, key, value, None, shared).transpose(1, 2), None
    first = query.shape[2] - mask.shape[2]
    causal = torch.full((first, first), HIDDEN, dtype=mask.dtype, device=mask.device).triu(1)
    early = _weighted(query[:, :, :first], key[:, :, :first], value[:, :, :first], causal, shared)
    late = _weighted(query[:, :, first:], key, value, mask, shared)
    return torch.cat([early, late], 2).transpose(1, 2), None


def _weighted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, shared: int) -> Tensor:
    batch, heads, rows, channels = query.shape
    query = query.reshape(batch, heads // shared, shared * rows, channels)  # heads of a group share keys
    scores = (query @ key.transpose(2, 3)).view(batch, heads, rows, -1)
    weights = (scores if mask is None else scores + mask).softmax(-1).to(value.dtype)
    return (weights.view(batch, heads // shared, shared * rows, -1) @ value).view(batch, heads, rows, channels)


AttentionInterface.register(NAME, attend)
