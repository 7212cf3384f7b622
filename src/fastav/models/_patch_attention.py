"""The attention in the vision towers of Qwen's families, and of others that concatenate the patches of all media."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastav.adapter import EncoderAttention, EncoderCall, ModelAdapter
from fastav.layout import Modality
from fastav.models._encoder_attention import sequence_attention


class Patches(NamedTuple):
    """The patches of one call of a tower, in the order of its layers.

    lengths: of the sequences that attend to themselves in the last layer. merge: patches in a token, which are
    neighbours. places: of each token of the prompts, its place in that order; None if it is the same order.
    """

    lengths: Sequence[int]
    merge: int
    places: Tensor | None


class PatchAttention(EncoderAttention):
    """The attention in the last layer of a tower in which the patches of each step in time attend to each other.

    A token has the mean of its patches. Some towers (Qwen2.5's) order tokens by windows, to which most of their layers
    attend, but the last of released models does not. Images and videos are encoded in calls of their own.
    """

    modalities = (Modality.IMAGE, Modality.VIDEO)

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter

    def modules(self, model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
        """The vision tower, and the attention of its last layer."""
        tower = self.adapter.encoders(model)[0]
        return tower, tower.get_submodule("blocks")[-1].attn  # pyright: ignore[reportIndexIssue]

    def begin(self, call: EncoderCall) -> Patches:
        """The patches of the images or videos; it waits for the device to read their sizes, as the tower does."""
        tower: Any = getattr(call.config, "vision_config")  # noqa: B009  (other configurations have none)
        merge, grids = tower.spatial_merge_size, call.inputs["grid_thw"].tolist()
        steps = [height * width for time, height, width in grids for _ in range(time)]
        if not (side := getattr(tower, "window_size", 0) // merge // tower.patch_size):
            return Patches(steps, merge**2, None)
        order, windows = window_order([(time, height // merge, width // merge) for time, height, width in grids], side)
        is_full = tower.depth - 1 in tower.fullatt_block_indexes
        places = torch.from_numpy(np.argsort(order)).to(call.inputs["grid_thw"].device)  # pyright: ignore[reportUnknownMemberType]
        return Patches(steps if is_full else [length * merge**2 for length in windows], merge**2, places)

    def scores(
        self, attention: nn.Module, call: Patches, attention_inputs: Mapping[str, Any]
    ) -> Float[Tensor, " tokens"]:
        """The attention that each token receives: the mean over heads, its step in time, and its patches."""
        tokens = rotated_attention(attention, call.lengths, attention_inputs).view(-1, call.merge).mean(1)
        return tokens if call.places is None else tokens[call.places.to(tokens.device)]


def rotated_attention(attention: Any, lengths: Sequence[int], inputs: Mapping[str, Any]) -> Float[Tensor, " patches"]:
    """The attention that each patch receives in a layer with rotary positions.

    lengths: of the sequences that attend to themselves. inputs: arguments by name of the layer's attention.
    """
    hidden, (cosine, sine) = inputs["hidden_states"], inputs["position_embeddings"]
    if hasattr(attention, "qkv"):
        query, key, _ = attention.qkv(hidden).chunk(3, dim=-1)
    else:
        names = ("q", "k") if hasattr(attention, "q") else ("q_proj", "k_proj")
        query, key = (getattr(attention, name)(hidden) for name in names)
    query, key = (_rotated(part.unflatten(-1, (attention.num_heads, -1)), cosine, sine) for part in (query, key))
    return sequence_attention(query, key, lengths, attention.scaling)


def _rotated(
    part: Float[Tensor, "patches heads head"],
    cosine: Float[Tensor, "patches head"],
    sine: Float[Tensor, "patches head"],
) -> Float[Tensor, "patches heads head"]:
    """Queries or keys with rotary positions, computed in float32 and in the dtype that they had."""
    first, second = part.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (part.float() * cosine[:, None].float() + turned * sine[:, None].float()).to(part.dtype)


def window_order(grids: Sequence[tuple[int, int, int]], side: int) -> tuple[Int[np.ndarray, " tokens"], list[int]]:
    """The tokens of grids in the order of a tower with windows, and the number of tokens in each window.

    grids: tokens along time, height and width. side: of a window, in tokens; at the edges of a grid they are smaller.
    """
    orders, lengths, start = [np.zeros(0, np.int64)], list[int](), 0
    for grid in grids:
        time, row, column = np.indices(grid).reshape(3, -1)
        windows = np.stack([time, row // side, column // side])
        orders.append(start + np.lexsort((column, row, *windows[::-1])))
        lengths += np.unique(windows, axis=1, return_counts=True)[1].tolist()
        start += len(time)
    return np.concatenate(orders), lengths
