"""A cache layer that holds fewer tokens than the model believes."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from fastav.errors import UnsupportedPlan


class PrunedLayer(DynamicLayer):
    """Keys and values of the tokens that one layer kept, with their places in the unpruned sequence.

    It reports the length of the unpruned sequence, so that positions and masks are made as for the plain model; the
    engine then picks the columns of the mask that are stored here (`positions`).

    slots: column of the padded prompt of every kept token; `prompt` where a row keeps fewer tokens than the longest of
    its batch, and valid is False there. valid: None if all are real. prompt: length of the padded prompt. owner:
    fingerprint of the plan. window: how many tokens a later query sees at most, itself included; of the prompt's, one
    less is held.
    armed: the engine is about to see to the mask of the next update.
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
        self.armed = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all that these queries may see.

        Raises: UnsupportedPlan if nobody prunes: the model's own mask does not fit what is stored here.
        """
        if not self.armed:
            raise UnsupportedPlan(
                "a cache that was filled while pruning is used without", "decode in a context with the same plan"
            )
        self.armed = False
        if first := not self.is_initialized:  # where hidden states come from may be another device than the layer's
            self.slots = self.slots.to(key_states.device)
            self.valid = None if self.valid is None else self.valid.to(key_states.device)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if first and self.window is not None and 0 < self.window - 1 < self.slots.shape[1]:
            self._hold_last(self.window - 1)
        return keys, values

    def keep(self, index: Int[Tensor, "batch kept"], real: Bool[Tensor, "batch kept"] | None) -> None:
        """Keep these of the tokens that are stored, and no others.  real: which of them there are (None: all)."""
        assert self.keys is not None
        assert self.values is not None
        place = index[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        self.keys = self.keys.gather(2, place)
        self.values = self.values.gather(2, place[..., : self.values.shape[3]].contiguous())
        slots = self.slots.gather(1, index)
        self.slots = slots if real is None else torch.where(real, slots, self.prompt)
        self.valid = real

    def _hold_last(self, tokens: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = (x[:, :, -tokens:].contiguous() for x in (self.keys, self.values))
        self.slots = self.slots[:, -tokens:]
        self.valid = None if self.valid is None else self.valid[:, -tokens:]

    @property
    def generated(self) -> int:
        """Tokens stored after the prompt."""
        return super().get_seq_length() - self.slots.shape[1] if self.is_initialized else 0

    def get_seq_length(self) -> int:
        """Length of the unpruned sequence."""
        return self.prompt + self.generated if self.is_initialized else 0

    def positions(self, new: int) -> Int[Tensor, "batch stored"]:
        """Column in the unpruned sequence of everything stored once `new` more tokens are."""
        later = torch.arange(self.prompt, self.prompt + self.generated + new, device=self.slots.device)
        return torch.cat([self.slots, later.expand(self.slots.shape[0], -1)], dim=1)

    def validity(self, new: int) -> Bool[Tensor, "batch stored"] | None:
        """Which of them are real; None if all are."""
        if self.valid is None:
            return None
        later = torch.ones(self.valid.shape[0], self.generated + new, dtype=torch.bool, device=self.valid.device)
        return torch.cat([self.valid, later], dim=1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
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

        Raises: UnsupportedPlan if positive, or if it reaches into the prompt, whose dropped tokens cannot come back.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > self.generated:
            raise UnsupportedPlan(
                f"cannot crop a pruned layer by {tokens_to_remove}: only generated tokens can go", "prefill again"
            )
        super().crop(tokens_to_remove)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.slots = change(self.slots)
        if self.valid is not None:
            self.valid = change(self.valid)
