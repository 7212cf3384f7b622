"""Gathering the kept tokens.  Indices have known sizes, so nothing here waits for the device."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor


def take(
    x: Float[Tensor, "*lead tokens features"], index: Int[Tensor, "batch kept"]
) -> Float[Tensor, "*newlead kept features"]:
    """Entries `index` of the token axis.  The batch axis before it may have size 1 if all rows are equal."""
    if index.shape[0] == 1:
        return x.index_select(-2, index[0])
    x = x.expand(*x.shape[:-3], index.shape[0], *x.shape[-2:])
    return x.gather(-2, index[..., None].expand(*x.shape[:-2], index.shape[1], x.shape[-1]))


def take_positions(x: Num[Tensor, "*lead tokens"], index: Int[Tensor, "batch kept"]) -> Num[Tensor, "*newlead kept"]:
    """Columns `index` of position ids, of shape [batch, tokens] or [axes, batch, tokens] (M-RoPE)."""
    x = x.expand(*x.shape[:-2], index.shape[0], x.shape[-1])
    return x.gather(-1, index.expand(*x.shape[:-1], index.shape[1]))


def take_keys(
    x: Float[Tensor, "batch kv_heads tokens features"], index: Int[Tensor, "batch kept"]
) -> Float[Tensor, "batch kv_heads kept features"]:
    """Keys of the tokens `index`."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class TokenSubset(NamedTuple):
    """The tokens that a layer runs on, or whose keys it stores.

    slots: columns of the tokens, in the padded prompt or in the whole sequence. valid: which of them are real (None:
    all); the slots of others are meaningless.
    """

    slots: Int[Tensor, "batch kept"]
    valid: Bool[Tensor, "batch kept"] | None

    def followed_by(self, later: "TokenSubset", shift: int) -> "TokenSubset":
        """These tokens, then later ones, whose slots are shifted; on the device of the later ones."""
        parts, device = (self, later), later.slots.device
        slots = torch.cat([self.slots.to(device), later.slots + shift], dim=1)
        if self.valid is None and later.valid is None:
            return TokenSubset(slots, None)
        valid = [torch.ones_like(part.slots, dtype=torch.bool) if part.valid is None else part.valid for part in parts]
        return TokenSubset(slots, torch.cat([one.to(device) for one in valid], dim=1))
