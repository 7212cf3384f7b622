"""The inputs and outputs of transformers' decoder layers while tokens are dropped."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache

from fastav import cache_argument
from fastav.engines.transformers.kv_cache import pruned_layer
from fastav.engines.transformers.masks import last_rows_mask, prefill_mask
from fastav.errors import UnsupportedModel, UnsupportedPlan
from fastav.pruning import indexing
from fastav.pruning.indexing import TokenSubset
from fastav.pruning.state import PruningState


class LayerInputs:
    """The arguments of decoder layers in one running prefill.

    last_only: whether the model computes logits for the last token alone. only_last_rows: whether layers now run on the
    prompt's last tokens alone. is_restored: whether the last layer has run and its output is at full length.
    """

    def __init__(self, state: PruningState, *, last_only: bool) -> None:
        self.state, self.last_only = state, last_only
        self.only_last_rows = self.is_restored = False
        self._slots = state.slots
        self._shrunk: dict[Any, tuple[Any, Any]] = {}  # (original, shrunk) arguments since the last cut
        self._rotary: dict[Any, tuple[Sequence[Tensor], Tensor]] = {}

    def arguments(self, index: int, kwargs: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
        """A layer's arguments for the remaining tokens, with a cache layer that records these tokens."""
        state, compiled = self.state, self.state.compiled
        tokens = state.enter_layer(index)
        if index < compiled.n_kv_layers and (cache := cache_argument.in_arguments(kwargs)) is not None:
            if state.cached:
                cache.layers[index].expect_prefill(tokens, state.total)
            else:
                like = cache.layers[index] if index < len(cache.layers) else None
                owner, window = compiled.fingerprint, compiled.windows[index]
                cache.layers[index : index + 1] = [pruned_layer(like, tokens, state.length, owner, window)]
        if state.is_full and tokens.valid is None and tokens.slots.shape[1] == state.total:
            return kwargs
        if self._slots is not state.slots:
            self._slots = state.slots
            self._shrunk.clear()
        self.only_last_rows = self._has_only_last_rows(index, kwargs)
        shrunk = {}
        for name, value in kwargs.items():
            key = (name, id(value), id(tokens.slots), self.only_last_rows)
            if key not in self._shrunk:
                self._shrunk[key] = (value, self._shrink(name, value, tokens, dtype))
            shrunk[name] = self._shrunk[key][1]
        return shrunk

    def arguments_before_cuts(self, index: int, kwargs: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
        """A layer's arguments for the tokens that remain before its cuts, to run it without changing the cache.

        A first prefill needs no cache. In a later turn it is a copy, which returns the layer's cached keys as the cache
        would: unpacked, on the layer's device, before the new ones.
        """
        for name, value in kwargs.items():
            if isinstance(value, Cache):
                kwargs = {**kwargs, name: _with_copied_layer(value, index) if self.state.cached else None}
        return self.arguments(index, kwargs, dtype)

    def cut_earlier_caches(self, kwargs: Mapping[str, Any]) -> None:
        """Keep only the remaining tokens of this prefill in the caches of all layers that the plan says."""
        state, places = self.state, dict[int, Tensor]()
        if (cache := cache_argument.in_arguments(kwargs)) is None:
            return
        for layer, tokens in state.layer_tokens.items():
            is_same = tokens.slots.shape == state.slots.shape and state.valid is None  # nothing was dropped since
            if layer >= state.compiled.earlier_caches_until or is_same:
                continue
            if (key := id(tokens.slots)) not in places:
                places[key] = state.places_among(tokens)
            earlier = state.cached[layer].slots.shape[1] if state.cached else 0
            cache.layers[layer].keep(places[key], state.valid, earlier=earlier)

    def restore(self, hidden: Tensor) -> Tensor:
        """Hidden states at full length, zero for dropped tokens; or of the last token alone if `last_only`."""
        state = self.state
        state.move_to(hidden.device)
        self.is_restored = True
        if self.last_only:
            return hidden[..., -1:, :]
        full = hidden.new_zeros(*hidden.shape[:-2], state.length + 1, hidden.shape[-1])
        full.scatter_(-2, state.slots[..., None].expand_as(hidden), hidden)
        return full[..., : state.length, :]

    def add_visual(self, hidden: Tensor, mask: Tensor, embeds: Tensor) -> Tensor:
        """Add Deepstack's visual features after an early layer, to the remaining video tokens.

        mask: [batch, length], True for the tokens of the features. embeds: [tokens in mask, features]. After the last
        layer, hidden states are at full length already.
        """
        state = self.state
        state.move_to(hidden.device)
        full = hidden.new_zeros(hidden.shape[0], state.length + 1, hidden.shape[-1])
        full[:, :-1][mask.to(hidden.device)] = embeds.to(hidden.device, hidden.dtype)
        if not self.is_restored:
            return hidden + indexing.take(full, state.slots)
        kept = torch.zeros(full.shape[:2], dtype=torch.bool, device=hidden.device).scatter(1, state.slots, True)
        return hidden + full.masked_fill(~kept[..., None], 0)[:, state.length - hidden.shape[1] : state.length]

    def _has_only_last_rows(self, index: int, kwargs: Mapping[str, Any]) -> bool:
        """Whether a layer that shares keys runs on the prompt's last tokens alone, as no others are needed."""
        state, rotary = self.state, kwargs.get("position_embeddings")
        if index < state.compiled.n_kv_layers or rotary is None or rotary[0].shape[-2] == state.length:
            return False
        last = rotary[0].shape[-2]
        expected = torch.arange(state.length - last, state.length, device=state.slots.device)
        if last > 1 and not bool((state.slots[:, -last:] == expected).all()):
            raise UnsupportedPlan(f"logits_to_keep={last} includes dropped tokens", "use logits_to_keep=1")
        return True

    def _shrink(self, name: str, value: Any, keys: TokenSubset, dtype: torch.dtype) -> Any:
        state, index = self.state, self.state.columns
        kind: Any = state.compiled.config._attn_implementation
        if isinstance(value, Tensor):
            value = value.to(index.device)  # the decoder creates masks and positions on its first layer's device
        match name, value:
            case "attention_mask", _ if self.only_last_rows:
                return last_rows_mask(value, keys, state.total, kind=kind, dtype=dtype)
            case "attention_mask", _:
                rows = TokenSubset(state.slots, state.valid)
                return prefill_mask(value, rows, keys, past=state.past, kind=kind, dtype=dtype)
            case "position_ids" | "cache_position", Tensor():
                # at batch size 1, flash attention interprets gaps as packed sequences; RoPE reads position_embeddings
                return None if "flash" in kind else indexing.take_positions(torch.atleast_2d(value), index)
            case (("position_embeddings" | "per_layer_input"), _) if self.only_last_rows:
                return value
            case "position_embeddings", (Tensor(), Tensor()):
                return indexing.take(self._stacked_rotary(value, index), index).unbind()
            case "per_layer_input", Tensor():
                return indexing.take(value, index)
            case _, Tensor() if state.length in value.shape:
                raise UnsupportedModel(f"layers take {name} {list(value.shape)}, whose token axis is unknown")
        return value

    def _stacked_rotary(self, parts: Sequence[Tensor], index: Int[Tensor, "batch kept"]) -> Tensor:
        """Cosines and sines of all tokens in one tensor, so that every cut needs one gather."""
        key = (id(parts[0]), index.device)
        if key not in self._rotary:
            self._rotary[key] = (parts, torch.stack(list(parts)).to(index.device))
        return self._rotary[key][1]


def _with_copied_layer(cache: Cache, index: int) -> Cache:
    """A cache that shares all layers with another but this one, whose tensors are replaced, not changed."""
    copied = copy(cache)
    copied.layers = list(cache.layers)
    copied.layers[index] = copy(cache.layers[index])
    return copied
