"""Cache layers that store only the kept tokens, and report the length of the unpruned sequence."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer, QuantizedLayer, QuantoQuantizedLayer

from fastav.errors import UnsupportedPlan
from fastav.pruning.indexing import TokenSubset


class PrunedLayer(DynamicLayer):
    """Keys and values of the tokens that one layer keeps, with their positions in the unpruned sequence.

    The layer reports the length of the unpruned sequence, so that positions and masks are made as for the unpruned
    model; the engine then gathers the columns of the mask that are stored here (`positions`).

    slots: column in the unpruned sequence of every token stored by the last prefill; of rows that keep fewer tokens
    than the longest row, the padding has any. valid: False for that padding; None if there is none. prompt: length of
    the unpruned sequence at the end of the last prefill. owner: fingerprint of the plan. window: the layer's window in
    tokens, a later query included, so that one prompt token less is stored; None for full attention.
    expects_update: set by the engine before an update whose mask it adapts.
    """

    def __init__(
        self,
        slots: Int[Tensor, "batch kept"],
        valid: Bool[Tensor, "batch kept"] | None,
        prompt: int,
        owner: str,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.slots = slots
        self.valid = valid
        self.prompt = prompt
        self.owner = owner
        self.window = window
        self.expects_update = True
        self._expected: tuple[TokenSubset, int] | None = None

    def expect_tokens(self) -> None:
        """Expect an update by tokens that are all kept."""
        self.expects_update, self._expected = True, None

    def expect_prefill(self, tokens: TokenSubset, length: int) -> None:
        """Expect an update by a prefill of a later turn.

        tokens: all that are stored after it, by column. length: of the unpruned sequence after it.
        """
        self.expects_update, self._expected = True, (tokens, length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all that these queries may see.

        Raises: UnsupportedPlan if the model is not being pruned: its own mask does not fit the stored tokens.
        """
        if not self.expects_update:
            raise UnsupportedPlan(
                "a cache that was filled while pruning is used without pruning",
                "decode in a context with the same plan",
            )
        self.expects_update = False
        is_prefill = not self.is_initialized or self._expected is not None
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self._expected is not None:
            ((self.slots, self.valid), self.prompt), self._expected = self._expected, None
        if is_prefill:  # hidden states may come from another device than the layer's
            self._rows(lambda t: t.to(key_states.device))
        if is_prefill and self.window is not None and 0 < self.window - 1 < self.slots.shape[1]:
            self._keep_last(self.window - 1)
        return keys, values

    def keep(
        self, index: Int[Tensor, "batch kept"], valid: Bool[Tensor, "batch kept"] | None, *, earlier: int = 0
    ) -> None:
        """Keep only these of the tokens that the last prefill stored, and all before them.

        valid: which indices stand for a token (None: all). earlier: the number of tokens stored before that prefill.
        Raises: UnsupportedPlan if the sequence fills the layer's window, so that its first tokens are no longer stored.
        """
        if self.window is not None and self.window <= self.prompt:
            raise UnsupportedPlan(
                f"{self.prompt} tokens fill the window of {self.window} tokens, and its cache has lost the first ones",
                "ask about a shorter part of the clip",
            )
        assert self.keys is not None
        assert self.values is not None
        index = index.to(self.slots.device)  # the cut may be before a layer on another device
        valid = None if valid is None else valid.to(index.device)
        if earlier:
            first = torch.arange(earlier, device=index.device).expand(len(index), -1)
            real = self.valid if self.valid is None else self.valid[:, :earlier]
            index, valid = TokenSubset(first, real).followed_by(TokenSubset(index, valid), earlier)
        stored = index.to(self.keys.device)  # an offloaded cache has moved them to the host already
        expanded = stored[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        self.keys = self.keys.gather(2, expanded)
        self.values = self.values.gather(2, expanded[..., : self.values.shape[3]].contiguous())
        slots = self.slots.gather(1, index)
        self.slots = slots if valid is None else torch.where(valid, slots, self.prompt)
        self.valid = valid

    def _keep_last(self, tokens: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = (x[:, :, -tokens:].contiguous() for x in (self.keys, self.values))
        self.slots = self.slots[:, -tokens:]
        self.valid = None if self.valid is None else self.valid[:, -tokens:]

    @property
    def n_stored(self) -> int:
        """The number of stored tokens."""
        return super().get_seq_length()

    @property
    def n_generated(self) -> int:
        """The number of stored tokens after the last prefill."""
        return self.n_stored - self.slots.shape[1] if self.is_initialized else 0

    def get_seq_length(self) -> int:
        """The length of the unpruned sequence."""
        return self.prompt + self.n_generated if self.is_initialized else 0

    def tokens(self) -> TokenSubset:
        """The stored tokens, by column of the unpruned sequence."""
        return TokenSubset(self.positions(0), self.validity(0))

    def positions(self, n_new: int) -> Int[Tensor, "batch stored"]:
        """The column in the unpruned sequence of every stored token, and of `n_new` tokens to be stored next."""
        later = torch.arange(self.prompt, self.prompt + self.n_generated + n_new, device=self.slots.device)
        return torch.cat([self.slots, later.expand(self.slots.shape[0], -1)], dim=1)

    def validity(self, n_new: int) -> Bool[Tensor, "batch stored"] | None:
        """Which of the tokens of `positions` are real; None if all are."""
        if self.valid is None:
            return None
        later = torch.ones(self.valid.shape[0], self.n_generated + n_new, dtype=torch.bool, device=self.valid.device)
        return torch.cat([self.valid, later], dim=1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows to follow the beams."""
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self._rows(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` generated tokens.

        Raises: UnsupportedPlan if positive, or if it reaches into a prompt, whose dropped tokens are lost.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > self.n_generated:
            raise UnsupportedPlan(
                f"cannot crop a pruned layer by {tokens_to_remove}: only generated tokens can be removed",
                "prefill again",
            )
        super().crop(tokens_to_remove)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.slots = change(self.slots)
        if self.valid is not None:
            self.valid = change(self.valid)


class PrunedQuantizedLayer(PrunedLayer, QuantoQuantizedLayer):
    """A pruned layer that packs keys and values as quanto does, in groups of values of one token.

    A layer packs the whole prompt at once, and then again whenever `residual_length` later tokens are waiting. The
    tokens that pruning drops count as waiting too, so that it packs when the unpruned layer does.

    like: the layer in whose place it is, for its settings. Other arguments: as for `PrunedLayer`.
    """

    def __init__(
        self,
        slots: Int[Tensor, "batch kept"],
        valid: Bool[Tensor, "batch kept"] | None,
        prompt: int,
        owner: str,
        window: int | None,
        like: QuantoQuantizedLayer,
    ) -> None:
        super().__init__(slots, valid, prompt, owner, window)
        QuantoQuantizedLayer.__init__(
            self, like.nbits, like.axis_key, like.axis_value, like.q_group_size, like.residual_length
        )
        self._residual_length = like.residual_length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, pack them if it is time, and return all that these queries may see.

        Raises: UnsupportedPlan if a group would hold values of several tokens, or as `PrunedLayer.update`.
        """
        for size in (key_states.shape[-1], value_states.shape[-1]):
            if size % self.q_group_size:
                raise UnsupportedPlan(
                    f"a quantized cache with groups of {self.q_group_size} values scales tokens of {size} values "
                    "together, dropped ones with kept ones",
                    f"set q_group_size of the cache to {size} or a divisor of it",
                )
        before = self.get_seq_length()
        keys_and_values = super().update(key_states, value_states, *args, **kwargs)
        n_dropped = self.get_seq_length() - before - key_states.shape[-2]
        assert self.keys is not None
        is_packed = self.keys.ndim < 4
        self.residual_length = self._residual_length if is_packed else self.residual_length - n_dropped
        return keys_and_values

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens, some of which are packed.  Raises: UnsupportedPlan."""
        raise UnsupportedPlan("a quantized cache cannot be cropped", "prefill again")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse to repeat rows, which are packed together.  Raises: UnsupportedPlan."""
        raise UnsupportedPlan("rows of a quantized cache cannot be repeated", "repeat the prompt in the batch")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse to select rows, which are packed together.  Raises: UnsupportedPlan."""
        raise UnsupportedPlan("rows of a quantized cache cannot be selected", "prefill the rows that you need")


def pruned_layer(like: Any, tokens: TokenSubset, prompt: int, owner: str, window: int | None) -> PrunedLayer:
    """A layer for a first prefill, of the same kind as the layer in whose place it is.

    like: that layer; None if the cache makes its layers as they are needed. Other arguments: as for `PrunedLayer`.
    """
    if isinstance(like, QuantoQuantizedLayer):
        return PrunedQuantizedLayer(*tokens, prompt, owner, window, like)
    return PrunedLayer(*tokens, prompt, owner, window)


def n_stored(layer: Any) -> int:
    """The number of tokens in a layer of a cache."""
    if isinstance(layer, PrunedLayer):
        return layer.n_stored
    if isinstance(layer, QuantizedLayer):
        return layer.get_seq_length()
    return 0 if layer.keys is None else layer.keys.shape[-2]


def cached_tokens(layers: Sequence[Any], batch: int, past: int, mask: Tensor | None) -> list[TokenSubset]:
    """The tokens that each layer of a cache holds, by column of the unpruned sequence.

    batch: number of rows. past: length of the unpruned sequence.
    mask: [batch, columns] of the whole sequence, of which 0 hides a token; None
    or of more axes if it hides none. Layers that hold the same tokens share one result. Reading a mask waits for the
    device, once.
    """
    hides = mask is not None and mask.ndim == 2 and not bool(mask[:, :past].all())
    known: dict[Any, tuple[Any, TokenSubset]] = {}
    result: list[TokenSubset] = []
    for layer in layers:
        stored = n_stored(layer)
        pruned = isinstance(layer, PrunedLayer)
        key = (id(layer.slots), id(layer.valid), stored) if pruned else (layer.keys.device, stored)
        if key not in known:
            tokens = layer.tokens() if pruned else _last_columns(stored, batch, past, layer.keys.device)
            known[key] = layer, _without_hidden(tokens, mask) if hides and mask is not None else tokens
        result.append(known[key][1])
    return result


def _last_columns(stored: int, batch: int, past: int, device: torch.device) -> TokenSubset:
    return TokenSubset(torch.arange(past - stored, past, device=device).expand(batch, -1), None)


def _without_hidden(tokens: TokenSubset, mask: Tensor) -> TokenSubset:
    slots, valid = tokens
    real = mask.to(slots.device).bool().gather(1, slots.clamp(max=mask.shape[1] - 1))
    return TokenSubset(slots, real if valid is None else real & valid)
