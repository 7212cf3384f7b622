"""A batch of vLLM on its way through the layers: prompts, pieces of prompts and single tokens, one after another.

vLLM lays the tokens of all requests out flat. A cut leaves some of them; what follows in each layer's cache is packed,
so that a layer's attention sees the sequence that is left and nothing else.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastav.engines.transformers import gather
from fastav.engines.vllm.passage import Passage
from fastav.errors import UnsupportedPlan
from fastav.method import Signal


class Geometry(NamedTuple):
    """Where the tokens of one layer are: in the flat batch, and in the cache.

    requests: rows of the batch that have tokens there. starts: where each begins, and where the last ends. lengths: of
    each, with what its cache held before. row, place: of each token, which of these requests it is of, and its place in
    that request's cache.
    """

    requests: Int[np.ndarray, " rows"]
    starts: Int[np.ndarray, " ends"]
    lengths: Int[np.ndarray, " rows"]
    row: Int[np.ndarray, " tokens"]
    place: Int[np.ndarray, " tokens"]


def geometry(tokens: Sequence[int], before: Sequence[int]) -> Geometry:
    """Of requests that have so many tokens in a layer, and so many in its cache already."""
    requests = np.flatnonzero(tokens)
    new, held = np.asarray(tokens, np.int64)[requests], np.asarray(before, np.int64)[requests]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(new)])
    row = np.repeat(np.arange(len(requests)), new)
    place = np.arange(starts[-1]) - starts[row] + held[row]
    return Geometry(requests, starts, new + held, row, place)


class Row:
    """One request of a batch.

    computed: tokens of prompt and answer that have run before. tokens: how many run now. here: which of those are still
    there.

    Raises: UnsupportedPlan for a piece of a prompt that scores decide about.
    """

    def __init__(self, passage: Passage, computed: int, tokens: int) -> None:
        self.passage, self.computed, self.tokens = passage, computed, tokens
        self.here: Tensor | np.ndarray = np.arange(tokens)
        if self.cut_here and passage.prefill is not None and (computed or tokens < passage.length):
            raise UnsupportedPlan(
                f"{tokens} tokens of a prompt of {passage.length} came alone, and the plan scores whole prompts",
                "--no-enable-chunked-prefill",
            )

    @property
    def cut_here(self) -> bool:
        """Whether tokens of this row may be dropped."""
        return not self.passage.whole and self.computed < self.passage.length

    def before(self, layer: int) -> int:
        """Tokens that a layer's cache holds already."""
        return self.passage.before(layer, self.computed)

    def cut(self, layer: int, hidden: Float[Tensor, "tokens features"]) -> Float[Tensor, "kept features"]:
        """What enters a layer, of what is still there."""
        if not self.cut_here or layer not in self.passage.made.layers:
            return hidden
        if self.passage.prefill is not None:
            return self._cut_by_scores(layer, hidden)
        assert isinstance(self.here, np.ndarray)
        assert self.passage.stays is not None
        place = self.computed + self.here
        stays = np.ones(len(place), bool)  # of an answer that is run again all stays
        of_prompt = place < self.passage.length
        stays[of_prompt] = self.passage.stays[layer][place[of_prompt]]
        self.here = self.here[stays]
        return hidden[uploaded(np.flatnonzero(stays), hidden.device)]

    def _cut_by_scores(self, layer: int, hidden: Float[Tensor, "tokens features"]) -> Float[Tensor, "kept features"]:
        prefill = self.passage.prefill
        assert prefill is not None
        asked, answer = hidden.split([prefill.slots.shape[1], hidden.shape[0] - prefill.slots.shape[1]])
        asked = prefill.cut(layer, asked[None])[0]
        later = torch.arange(self.passage.length, self.tokens, device=hidden.device)
        self.here = torch.cat([prefill.slots[0], later])
        return torch.cat([asked, answer])

    def wanted(self, layer: int) -> frozenset[Signal]:
        """What methods ask of a layer's attention."""
        return frozenset(self.passage.made.wanted.get(layer, ()) if self.cut_here else ())

    def observe(
        self,
        layer: int,
        wanted: Collection[Signal],
        query: Float[Tensor, "tokens heads head"],
        key: Float[Tensor, "tokens kv_heads head"],
        scaling: float | int,
    ) -> None:
        """Show methods what a layer's attention was given, of this row's prompt."""
        if wanted and (prefill := self.passage.prefill) is not None:
            prefill.stored[layer] = gather.Kept(prefill.slots, None)
            asked = prefill.slots.shape[1]
            q, k = (x[:asked].transpose(0, 1)[None] for x in (query, key))
            prefill.observe(layer, wanted, q, k, None, scaling)


class Walk:
    """A batch on its way."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self.rows, self.device = rows, device
        self._starts = np.concatenate([[0], np.cumsum([row.tokens for row in rows])])

    @property
    def cut_here(self) -> bool:
        """Whether tokens of this batch may be dropped."""
        return any(row.cut_here for row in self.rows)

    @property
    def whole(self) -> bool:
        """Whether every layer keeps every token of all its requests."""
        return all(row.passage.whole for row in self.rows)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that are cut for some request, in order."""
        return tuple(sorted({layer for row in self.rows if not row.passage.whole for layer in row.passage.made.layers}))

    @property
    def tokens(self) -> int:
        """How many tokens the batch has, before any cut."""
        return int(self._starts[-1])

    def cut(self, layer: int, hidden: Float[Tensor, "tokens features"]) -> Float[Tensor, "kept features"]:
        """What enters a layer."""
        parts = hidden.split([len(row.here) for row in self.rows])
        return torch.cat([row.cut(layer, part) for row, part in zip(self.rows, parts, strict=True)])

    def places(self) -> Int[Tensor, " kept"]:
        """Where in the whole batch what is still there was."""
        parts = [
            start + (row.here if isinstance(row.here, Tensor) else uploaded(row.here, self.device))
            for start, row in zip(self._starts[:-1].tolist(), self.rows, strict=True)
        ]
        return torch.cat(parts)

    def enter(self, layer: int) -> Geometry:
        """Where the tokens that are still there are in a layer."""
        return geometry([len(row.here) for row in self.rows], [row.before(layer) for row in self.rows])

    def wanted(self, layer: int) -> frozenset[Signal]:
        """What methods ask of a layer's attention."""
        return frozenset[Signal]().union(*(row.wanted(layer) for row in self.rows))

    def observe(
        self,
        layer: int,
        wanted: Collection[Signal],
        query: Float[Tensor, "tokens heads head"],
        key: Float[Tensor, "tokens kv_heads head"],
        scaling: float | int,
    ) -> None:
        """Show methods what a layer's attention was given, those that want this of it."""
        sizes = [len(row.here) for row in self.rows]
        total = sum(sizes)
        for row, q, k in zip(self.rows, query[:total].split(sizes), key[:total].split(sizes), strict=True):
            row.observe(layer, row.wanted(layer).intersection(wanted), q, k, scaling)

    def average(self, layer: int, wanted: Collection[Signal], mean: Callable[[Tensor], Tensor]) -> None:
        """Replace what was observed of a layer by its mean over ranks, which is found for all rows at once."""
        found = [
            (row.passage.prefill.signals, signal)
            for row in self.rows
            for signal in sorted(row.wanted(layer).intersection(wanted))
            if row.passage.prefill is not None
        ]
        rows = [signals[signal] for signals, signal in found]
        means = mean(torch.cat(rows, 1)).split([row.shape[1] for row in rows], 1)
        for (signals, signal), row in zip(found, means, strict=True):
            signals[signal] = row


def uploaded(array: Int[np.ndarray, " n"], device: torch.device) -> Int[Tensor, " n"]:
    """An array on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
