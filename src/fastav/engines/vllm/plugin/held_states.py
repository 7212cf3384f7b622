"""Hidden states held between the steps of a prefill, in blocks of the KV cache or in a tensor."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastav.engines.vllm import compat
from fastav.errors import UnsupportedPlan


@runtime_checkable
class StateStore(Protocol):
    """Hidden states of tokens that are numbered from 0, with the keys that score them."""

    def write(self, start: int, hidden: Float[Tensor, "tokens features"]) -> None:
        """Store the hidden states of tokens from `start` on."""
        ...

    def write_keys(self, start: int, keys: Float[Tensor, "tokens key_features"]) -> None:
        """Store the keys of tokens from `start` on."""
        ...

    def hidden(self, indices: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens features"]:
        """The hidden states of some tokens."""
        ...

    def keys(self, count: int) -> Float[Tensor, "count key_features"]:
        """The keys of the first tokens."""
        ...


class TensorStore:
    """States in memory of their own, for tokens that fit into one step."""

    def __init__(self, count: int, like: Float[Tensor, "tokens features"], key_features: int) -> None:
        self._hidden = like.new_empty(count, like.shape[1])
        self._keys = like.new_empty(count, key_features)

    def write(self, start: int, hidden: Float[Tensor, "tokens features"]) -> None:
        """Store hidden states."""
        self._hidden[start : start + len(hidden)] = hidden

    def write_keys(self, start: int, keys: Float[Tensor, "tokens key_features"]) -> None:
        """Store keys."""
        self._keys[start : start + len(keys)] = keys

    def hidden(self, indices: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens features"]:
        """The hidden states of some tokens."""
        return self._hidden[indices]

    def keys(self, count: int) -> Float[Tensor, "count key_features"]:
        """The keys of the first tokens."""
        return self._keys[:count]


class Page(NamedTuple):
    """The cache of one held layer.  group: its KV cache group. states: a view of its memory."""

    group: int
    states: Float[Tensor, "blocks block_size features"]


class HeldPages:
    """The memory of KV cache groups that hold states: every token's record is spread over the pages of its blocks.

    caches: of each held layer, its group and its cache. block_size: tokens of a block. features: of a token in one
    cache. key_features: of a token's keys in one layer. like: as wide as hidden states, and of their dtype.
    Raises: UnsupportedPlan for a layout of the cache in which a block is in several places.
    """

    def __init__(
        self, caches: Sequence[tuple[int, Tensor]], *, block_size: int, features: int, key_features: int, like: Tensor
    ) -> None:
        self.block_size, self.hidden_size, self.key_features = block_size, len(like), key_features
        self.pages = [Page(group, _blocks(cache, block_size, features, like.dtype)) for group, cache in caches]
        self.groups = {page.group for page in self.pages}
        assert sum(page.states.shape[2] for page in self.pages) >= len(like) + key_features, "states fit in no block"


def _blocks(cache: Tensor, block_size: int, features: int, dtype: torch.dtype) -> Tensor:
    """The memory of a layer's cache as [blocks, tokens, features], whatever the backend stores there.

    The backend may see a block as several of its own.
    """
    order = sorted(range(1, cache.ndim), key=cache.stride, reverse=True)
    try:
        flat = cache.permute(0, *order).view(cache.shape[0], -1).view(torch.uint8).view(dtype)
        n_blocks = cache.shape[0] if flat.shape[1] == block_size * features else -1
        return flat.view(n_blocks, block_size, features)
    except RuntimeError:
        raise UnsupportedPlan(
            "this layout of the KV cache has the memory of a block in several places, so that blocks cannot hold "
            "hidden states",
            "--no-enable-chunked-prefill, or VLLM_KV_CACHE_LAYOUT=LBHNC",
        ) from None


class BlockStore:
    """States of one request in blocks of the KV cache.  pages: where."""

    def __init__(self, pages: HeldPages) -> None:
        self._pages = pages
        self._tables: Mapping[int, Tensor] = {}

    def enter_step(self, tables: Mapping[int, Int[Tensor, " blocks"]]) -> None:
        """Continue with the request's blocks, by KV cache group: later steps may have more of them."""
        self._tables = tables

    def write(self, start: int, hidden: Float[Tensor, "tokens features"]) -> None:
        """Store hidden states."""
        self._scatter(start, hidden, 0)

    def write_keys(self, start: int, keys: Float[Tensor, "tokens key_features"]) -> None:
        """Store keys."""
        self._scatter(start, keys, self._pages.hidden_size)

    def hidden(self, indices: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens features"]:
        """The hidden states of some tokens."""
        return self._gather(indices, 0, self._pages.hidden_size)

    def keys(self, count: int) -> Float[Tensor, "count key_features"]:
        """The keys of the first tokens."""
        indices = torch.arange(count, device=next(iter(self._tables.values())).device)
        return self._gather(indices, self._pages.hidden_size, self._pages.hidden_size + self._pages.key_features)

    def _scatter(self, start: int, part: Tensor, first: int) -> None:
        """Write columns of the records of tokens from `start` on, the first of them at `first`."""
        indices = torch.arange(start, start + len(part), device=part.device)
        end, column = first + part.shape[1], 0
        for page in self._pages.pages:
            begin, stop = max(first, column), min(end, column + page.states.shape[2])
            if begin < stop:
                blocks, places = self._places(page, indices)
                page.states[blocks, places, begin - column : stop - column] = part[:, begin - first : stop - first]
            column += page.states.shape[2]

    def _gather(self, indices: Tensor, first: int, end: int) -> Tensor:
        parts, column = list[Tensor](), 0
        for page in self._pages.pages:
            width = page.states.shape[2]
            if column < end and column + width > first:
                parts.append(page.states[self._places(page, indices)][:, max(0, first - column) : end - column])
            column += width
        return torch.cat(parts, 1)

    def _places(self, page: Page, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks and places in them of some tokens."""
        size = self._pages.block_size
        return self._tables[page.group][indices // size].long(), indices % size


def held_layer(attention: Any, held_spec: Any) -> Any:
    """A layer for vLLM's KV cache that attends to nothing: its blocks hold states.

    attention: a layer of the decoder, whose backend says how the cache is laid out.
    """

    class HeldLayer(compat.AttentionLayerBase):
        num_heads, impl, spec = attention.num_heads, attention.impl, held_spec

        def get_attn_backend(self) -> Any:
            return attention.get_attn_backend()

        def get_kv_cache_spec(self, vllm_config: Any) -> Any:
            return held_spec

    return HeldLayer()
