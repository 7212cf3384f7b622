"""Buffers for the keys and values of a running answer, whose addresses stay the same from token to token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from fastav.engines.transformers.kv_cache import PrunedLayer
from fastav.errors import UnsupportedPlan
from fastav.pruning.verification import not_applied


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKV:
    """Keys and values of one layer after the prefill.

    slots: columns in the padded prompt. valid: which tokens are real (None: all). window: the layer's window in tokens,
    the query included (None: full attention).
    """

    keys: Float[Tensor, "batch kv_heads stored features"]
    values: Float[Tensor, "batch kv_heads stored value_features"]
    slots: Int[Tensor, "batch stored"]
    valid: Bool[Tensor, "batch stored"] | None
    window: int | None

    @classmethod
    def from_cache(
        cls, layer: DynamicLayer, mask: Bool[Tensor, "batch prompt"] | None, prompt: int, window: int | None
    ) -> "LayerKV":
        """Keys and values in a cache layer after a prefill.

        mask: which columns of the prompt are real (None: all). prompt: number of columns.
        """
        assert layer.keys is not None
        assert layer.values is not None
        if isinstance(layer, PrunedLayer):
            slots, valid = layer.tokens()
            if mask is not None and layer.n_generated:  # tokens behind the last prefill, padding among them
                real = mask.to(slots.device).gather(1, slots.clamp(max=prompt - 1))
                valid = real if valid is None else real & valid
        else:
            batch, _, stored, _ = layer.keys.shape
            slots = torch.arange(prompt - stored, prompt, device=layer.keys.device).expand(batch, stored)
            valid = None if mask is None else mask[:, prompt - stored :]
        return cls(keys=layer.keys, values=layer.values, slots=slots, valid=valid, window=window)

    def copy(self) -> "LayerKV":
        """A copy of the keys and values, which the buffers no longer change."""
        return replace(self, keys=self.keys.clone(), values=self.values.clone())

    def return_to(self, layer: DynamicLayer, surplus: int, length: int) -> None:
        """Put these keys and values, but for the last `surplus` tokens, into the layer that they came from.

        length: of the unpruned sequence then.
        """
        end = self.keys.shape[2] - surplus
        start = 0
        if isinstance(layer, DynamicSlidingWindowLayer):
            start, layer.cumulative_length = max(0, end - layer.sliding_window + 1), length
        layer.keys, layer.values = self.keys[:, :, start:end], self.values[:, :, start:end]

    def first(self, tokens: int) -> "LayerKV":
        """The keys and values of the first tokens."""
        return LayerKV(
            keys=self.keys[:, :, :tokens],
            values=self.values[:, :, :tokens],
            slots=self.slots[:, :tokens],
            valid=None,
            window=self.window,
        )

    def capacity(self, room: int, *, fixed: bool) -> int:
        """The number of tokens to allocate buffers for, with room for `room` more.

        If `fixed`, it is a multiple of 256, or of a quarter of the power of two below it, so that few shapes occur.
        """
        needed = self.keys.shape[2] + room
        multiple = max(256, 2 ** (needed.bit_length() - 1) // 4) if fixed else 1
        return -(-needed // multiple) * multiple


class StepLayer(DynamicLayer):
    """One layer's buffers [batch, kv_heads, capacity, features]: the prompt's tokens, then the decoded ones.

    positions: columns in the unpruned sequence. real: which stored tokens are not padding. updated: whether the running
    step has stored its token; on the host, so that reading it does not wait for the device.
    """

    def __init__(self, like: LayerKV, capacity: int, position: "DecodePosition", number: int) -> None:
        super().__init__()
        batch, device = like.keys.shape[0], like.keys.device
        self.dtype, self.device, self.is_initialized = like.keys.dtype, device, True
        self.keys, self.values = (
            torch.zeros(batch, part.shape[1], capacity, part.shape[3], dtype=part.dtype, device=device)
            for part in (like.keys, like.values)
        )
        self.positions = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.real = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        self.position, self.window, self.prompt_len = position, like.window, 0
        self.padded, self.masked = False, position.fixed
        self.updated = False
        self.at = position.state(device)[number + 1 : number + 2]

    def fill(self, prefill: LayerKV, prompt: int) -> None:
        """Start with the keys and values of a prefill of `prompt` columns."""
        assert self.keys is not None
        assert self.values is not None
        self.prompt_len = stored = prefill.keys.shape[2]
        for target, source in ((self.keys, prefill.keys), (self.values, prefill.values)):
            target[:, :, :stored].copy_(source)
            target[:, :, stored:].zero_()  # NaN would spread even if masked
        self.positions[:, :stored] = prefill.slots
        self.positions[:, stored:] = torch.arange(prompt, prompt + self.positions.shape[1] - stored, device=self.device)
        self.real[:, :stored] = True if prefill.valid is None else prefill.valid
        self.real[:, stored:] = False
        self.at.fill_(stored)
        slides = prefill.window is not None and prompt + self.positions.shape[1] - stored > prefill.window
        self.padded = prefill.valid is not None
        self.masked = self.position.fixed or self.padded or slides

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of one token, and return all stored ones; entire buffers if shapes are fixed."""
        assert self.keys is not None
        assert self.values is not None
        if key_states.shape[2] != 1:
            raise UnsupportedPlan("a decoding step takes one token", "prefill again to continue with a longer text")
        self.updated = True
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        if self.masked:
            self.real.index_fill_(1, self.at, True)
        if self.position.fixed:
            return self.keys, self.values
        return self.keys[:, :, : self._n_stored], self.values[:, :, : self._n_stored]

    def require_updated(self) -> None:
        """Check that the running step has stored its token here.  Raises: PlanNotApplied."""
        if not self.updated:
            raise not_applied("a decoding step did not reach the buffers with the prompt")

    def visible(self, device: torch.device) -> Bool[Tensor, "batch 1 1 stored"] | None:
        """A mask of the keys that the query of this step may see, among those that `update` returned; None for all.

        device: the query's device; its layer may read the keys of a layer on another one.
        """
        if not self.masked:
            return None
        real, positions = self.real, self.positions
        if not self.position.fixed:
            real, positions = real[:, : self._n_stored], positions[:, : self._n_stored]
        if self.window is not None:
            real = real & (positions > self.position.column(self.device) - self.window)
        return real[:, None, None].to(device)

    @property
    def _n_stored(self) -> int:
        return self.prompt_len + self.position.n_decoded + 1

    def stored(self) -> LayerKV:
        """The keys and values before the next step."""
        assert self.keys is not None
        assert self.values is not None
        until = self.prompt_len + self.position.n_decoded
        return LayerKV(
            keys=self.keys[:, :, :until],
            values=self.values[:, :, :until],
            slots=self.positions[:, :until],
            valid=self.real[:, :until] if self.padded else None,
            window=self.window,
        )

    def get_seq_length(self) -> int:
        """The length of the unpruned sequence so far."""
        return self.position.length


class DecodePosition:
    """The position of a running answer, on the host, and in one tensor on each device that layers run on.

    length: columns of the unpruned sequence so far. n_decoded: number of decoded tokens. fixed: whether shapes stay the
    same, so that a step can be captured: every step then reads entire buffers, with a mask.
    """

    def __init__(self, layers: int, devices: Iterable[torch.device], *, fixed: bool) -> None:
        self.fixed, self.length, self.n_decoded = fixed, 0, 0
        self._states = {device: torch.zeros(layers + 1, dtype=torch.long, device=device) for device in devices}

    def state(self, device: torch.device) -> Int[Tensor, " numbers"]:
        """The column of the unpruned sequence that this step decodes; then each layer's index into its buffers."""
        return self._states[device]

    def column(self, device: torch.device) -> Int[Tensor, " 1"]:
        """The column of the unpruned sequence that this step decodes."""
        return self.state(device)[:1]

    def advance(self) -> None:
        """Count one decoded token on the devices."""
        for state in self._states.values():
            state.add_(1)

    def begin(self, prompt: int) -> None:
        """Start after a prompt of this many columns."""
        self.length, self.n_decoded = prompt, 0
        for device in self._states:
            self.column(device).fill_(prompt)

    def tick(self) -> None:
        """Count one decoded token on the host."""
        self.length += 1
        self.n_decoded += 1


class StepCache(Cache):
    """The buffers of all layers that have keys and values of their own."""

    def __init__(self, like: Sequence[LayerKV], capacities: Sequence[int], *, fixed: bool) -> None:
        self.position = DecodePosition(len(like), {layer.keys.device for layer in like}, fixed=fixed)
        self.steps = [
            StepLayer(layer, capacity, self.position, number)
            for number, (layer, capacity) in enumerate(zip(like, capacities, strict=True))
        ]
        super().__init__(layers=list(self.steps))

    def fill(self, layers: Sequence[LayerKV], prompt: int) -> None:
        """Start with the keys and values of every layer after a prefill of `prompt` columns."""
        self.position.begin(prompt)
        for step, layer in zip(self.steps, layers, strict=True):
            step.fill(layer, prompt)

    def end_step(self) -> None:
        """Check that the step has stored its token in every layer, and reset.  Raises: PlanNotApplied."""
        for layer in self.steps:
            layer.require_updated()
            layer.updated = False

    def stored(self) -> list[LayerKV]:
        """The keys and values of every layer before the next step."""
        return [layer.stored() for layer in self.steps]
