"""A stand-in for flash attention that runs on a CPU: its masks and its rules, not its speed.

Like the kernels behind transformers' `flash_attention_*` it takes a [batch, keys] mask of real keys, aligns causality
to the last key, and takes position ids with gaps at batch size 1 for packed sequences, which pruning must not cause.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "flash_stand_in"


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    positions = kwargs.get("position_ids")
    assert positions is None or not bool(_is_packed_sequence(positions, query.shape[0])), "taken for packed sequences"
    groups, new, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = torch.ones(new, keys, dtype=torch.bool, device=query.device).tril(keys - new)[None, None]
    if attention_mask is not None:
        assert attention_mask.ndim == 2
        assert attention_mask.shape == (query.shape[0], keys)
        seen = seen & attention_mask.bool()[:, None, None]
    weights = (query @ key.transpose(-1, -2) * scaling).masked_fill(~seen, torch.finfo(query.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def register() -> None:
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)
