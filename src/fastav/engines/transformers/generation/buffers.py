"""Keys and values of a running answer, in buffers that stay where they are from token to token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from fastav.engines.transformers.kv_cache import PrunedLayer
from fastav.errors import UnsupportedPlan
from fastav.pruning.verification import not_applied


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What one layer holds when the prefill is done.

    slots: columns in the padded prompt. valid: which are real (None: all). window: how many tokens, itself included, a
    query sees (None: all).
    """

    keys: Float[Tensor, "batch kv_heads stored features"]
    values: Float[Tensor, "batch kv_heads stored value_features"]
    slots: Int[Tensor, "batch stored"]
    valid: Bool[Tensor, "batch stored"] | None
    window: int | None

    @classmethod
    def of(
        cls, layer: DynamicLayer, shown: Bool[Tensor, "batch prompt"] | None, prompt: int, window: int | None
    ) -> "Stored":
        """What a cache layer holds of `prompt` columns, of which `shown` are real (None: all)."""
        assert layer.keys is not None
        assert layer.values is not None
        if isinstance(layer, PrunedLayer):
            slots, valid = layer.slots, layer.valid
        else:
            batch, _, held, _ = layer.keys.shape
            slots = torch.arange(prompt - held, prompt, device=layer.keys.device).expand(batch, held)
            valid = None if shown is None else shown[:, prompt - held :]
        return cls(keys=layer.keys, values=layer.values, slots=slots, valid=valid, window=window)

    def first(self, tokens: int) -> "Stored":
        """Of these tokens no more than so many."""
        return Stored(
            keys=self.keys[:, :, :tokens],
            values=self.values[:, :, :tokens],
            slots=self.slots[:, :tokens],
            valid=None,
            window=self.window,
        )

    def capacity(self, room: int, *, fixed: bool) -> int:
        """Tokens that buffers are made for, which are to take `room` more.

        Where shapes are fixed, a multiple of 256, or of a quarter of the power of two below, so that they are few.
        """
        needed = self.keys.shape[2] + room
        multiple = max(256, 2 ** (needed.bit_length() - 1) // 4) if fixed else 1
        return -(-needed // multiple) * multiple


class StepLayer(DynamicLayer):
    """One layer's buffers [batch, kv_heads, capacity, features]: the prompt's tokens, then those that are decoded.

    places: columns of the unpruned sequence. real: what is stored and no padding. updated: whether the running
    step has stored its token; on the host, so that asking waits for nothing.
    """

    def __init__(self, like: Stored, capacity: int, clock: "Clock", number: int) -> None:
        super().__init__()
        batch, device = like.keys.shape[0], like.keys.device
        self.dtype, self.device, self.is_initialized = like.keys.dtype, device, True
        self.keys, self.values = (
            torch.zeros(batch, part.shape[1], capacity, part.shape[3], dtype=part.dtype, device=device)
            for part in (like.keys, like.values)
        )
        self.places = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.real = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        self.clock, self.window, self.held = clock, like.window, 0
        self.padded, self.masked = False, clock.fixed
        self.updated = False
        self.at = clock.state(device)[number + 1 : number + 2]

    def fill(self, given: Stored, prompt: int) -> None:
        """Begin behind what a prefill of `prompt` columns has stored."""
        assert self.keys is not None
        assert self.values is not None
        self.held = held = given.keys.shape[2]
        for mine, theirs in ((self.keys, given.keys), (self.values, given.values)):
            mine[:, :, :held].copy_(theirs)
            mine[:, :, held:].zero_()  # a masked NaN would spread all the same
        self.places[:, :held] = given.slots
        self.places[:, held:] = torch.arange(prompt, prompt + self.places.shape[1] - held, device=self.device)
        self.real[:, :held] = True if given.valid is None else given.valid
        self.real[:, held:] = False
        self.at.fill_(held)
        slides = given.window is not None and prompt + self.places.shape[1] - held > given.window
        self.padded = given.valid is not None
        self.masked = self.clock.fixed or self.padded or slides

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of one token, and return all of them; of fixed shape, if the clock says so."""
        assert self.keys is not None
        assert self.values is not None
        if key_states.shape[2] != 1:
            raise UnsupportedPlan("a decoding step takes one token", "prefill again to go on with a longer text")
        self.updated = True
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        if self.masked:
            self.real.index_fill_(1, self.at, True)
        if self.clock.fixed:
            return self.keys, self.values
        return self.keys[:, :, : self._used], self.values[:, :, : self._used]

    def require_updated(self) -> None:
        """Raises: PlanNotApplied if the running step has not stored its token here."""
        if not self.updated:
            raise not_applied("a decoding step did not reach the buffers that hold the prompt")

    def seen(self, device: torch.device) -> Bool[Tensor, "batch 1 1 stored"] | None:
        """What the query of this step may see of what `update` returned; None if all of it.

        device: that of the query, whose layer may read the keys of one that runs elsewhere.
        """
        if not self.masked:
            return None
        real, places = self.real, self.places
        if not self.clock.fixed:
            real, places = real[:, : self._used], places[:, : self._used]
        if self.window is not None:
            real = real & (places > self.clock.here(self.device) - self.window)
        return real[:, None, None].to(device)

    @property
    def _used(self) -> int:
        return self.held + self.clock.past + 1

    def stored(self) -> Stored:
        """All that is there before the coming step."""
        assert self.keys is not None
        assert self.values is not None
        until = self.held + self.clock.past
        return Stored(
            keys=self.keys[:, :, :until],
            values=self.values[:, :, :until],
            slots=self.places[:, :until],
            valid=self.real[:, :until] if self.padded else None,
            window=self.window,
        )

    def get_seq_length(self) -> int:
        """Length of the unpruned sequence so far."""
        return self.clock.length


class Clock:
    """Where a running answer is, on the host and, in one tensor each, on the devices that layers run on.

    fixed: shapes stay as they are, so that a step can be captured: every step is given whole buffers, with a mask.
    """

    def __init__(self, layers: int, devices: Iterable[torch.device], *, fixed: bool) -> None:
        self.fixed, self.length, self.past = fixed, 0, 0
        self._states = {device: torch.zeros(layers + 1, dtype=torch.long, device=device) for device in devices}

    def state(self, device: torch.device) -> Int[Tensor, " numbers"]:
        """Column of the unpruned sequence that this step decodes; then, layer by layer, the place in its buffers."""
        return self._states[device]

    def here(self, device: torch.device) -> Int[Tensor, " 1"]:
        """Column of the unpruned sequence that this step decodes."""
        return self.state(device)[:1]

    def advance(self) -> None:
        """By one token, on the devices."""
        for state in self._states.values():
            state.add_(1)

    def begin(self, prompt: int) -> None:
        """Behind a prompt of so many columns."""
        self.length, self.past = prompt, 0
        for device in self._states:
            self.here(device).fill_(prompt)

    def tick(self) -> None:
        """On the host."""
        self.length += 1
        self.past += 1


class StepCache(Cache):
    """The buffers of all layers that have keys and values of their own."""

    def __init__(self, like: Sequence[Stored], capacities: Sequence[int], *, fixed: bool) -> None:
        self.clock = Clock(len(like), {one.keys.device for one in like}, fixed=fixed)
        self.steps = [
            StepLayer(one, tokens, self.clock, number)
            for number, (one, tokens) in enumerate(zip(like, capacities, strict=True))
        ]
        super().__init__(layers=list(self.steps))

    def fill(self, given: Sequence[Stored], prompt: int) -> None:
        """Begin behind what a prefill of `prompt` columns has stored, layer by layer."""
        self.clock.begin(prompt)
        for layer, one in zip(self.steps, given, strict=True):
            layer.fill(one, prompt)

    def end_step(self) -> None:
        """Require that the step just run has reached every layer, and expect the next.  Raises: PlanNotApplied."""
        for layer in self.steps:
            layer.require_updated()
            layer.updated = False

    def stored(self) -> list[Stored]:
        """All that is there, layer by layer."""
        return [layer.stored() for layer in self.steps]
