"""A batch of vLLM while it runs through pruned layers: prompts, pieces of prompts and single tokens, packed.

vLLM concatenates the tokens of all requests. A cut drops some of them. The tokens that remain are packed in the batch
and in each layer's cache, so that a layer's attention sees the shorter sequences and nothing else.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastav.engines.vllm.plugin.chunked_prefill import ChunkedPrefill
from fastav.engines.vllm.plugin.request_state import RequestState
from fastav.errors import UnsupportedPlan
from fastav.method import Signal


class Geometry(NamedTuple):
    """Where the tokens of one layer are: in the packed batch, and in the cache.

    request_indices: the requests of the batch that have tokens there. query_start_loc: where the tokens of each begin,
    and where the last ones end. seq_lens: tokens of each, with those that its cache held before. batch_indices,
    positions: for each token, its request among these, and its index in that request's cache.
    """

    request_indices: Int[np.ndarray, " requests"]
    query_start_loc: Int[np.ndarray, " boundaries"]
    seq_lens: Int[np.ndarray, " requests"]
    batch_indices: Int[np.ndarray, " tokens"]
    positions: Int[np.ndarray, " tokens"]


def geometry(num_tokens: Sequence[int], kv_lens: Sequence[int]) -> Geometry:
    """The geometry of a layer.

    num_tokens: of each request, the tokens that run in the layer. kv_lens: those that its cache holds already.
    """
    request_indices = np.flatnonzero(num_tokens)
    query_lens = np.asarray(num_tokens, np.int64)[request_indices]
    context_lens = np.asarray(kv_lens, np.int64)[request_indices]
    query_start_loc = np.concatenate([np.zeros(1, np.int64), np.cumsum(query_lens)])
    batch_indices = np.repeat(np.arange(len(request_indices)), query_lens)
    offsets = np.arange(query_start_loc[-1]) - query_start_loc[batch_indices]
    positions = offsets + context_lens[batch_indices]
    return Geometry(request_indices, query_start_loc, query_lens + context_lens, batch_indices, positions)


class BatchRow:
    """One request of a batch.

    num_computed: tokens of prompt and answer that have run before. num_tokens: how many vLLM runs now. chunks: the
    prefill that goes on, of a prompt in chunks that scores select from; None for other requests. num_early: how many
    enter the first layer: withheld ones besides with the last chunk, none in later steps. remaining: indices of the
    tokens that no cut has dropped yet, counted from the first that runs now.

    Raises: UnsupportedPlan for a piece of a prompt whose tokens are selected by scores, without `chunks`.
    """

    def __init__(
        self, state: RequestState, num_computed: int, num_tokens: int, chunks: ChunkedPrefill | None = None
    ) -> None:
        self.state, self.num_computed, self.num_tokens, self.chunks = state, num_computed, num_tokens, chunks
        self.num_early = num_tokens
        if chunks is not None:
            self.num_early = chunks.late.num_early(num_computed + num_tokens) - chunks.late.num_early(num_computed)
        self.remaining: Tensor | np.ndarray = np.arange(self.num_early)
        is_whole = not num_computed and num_tokens >= state.prompt_len
        if self.is_cut and state.prefill is not None and chunks is None and not is_whole:
            raise UnsupportedPlan(
                f"the plan scores whole prompts, but only {num_tokens} of a prompt's {state.prompt_len} tokens came",
                "--no-enable-chunked-prefill",
            )

    @property
    def withheld(self) -> Int[np.ndarray, " tokens"]:
        """The ids of the tokens that run now and that vLLM does not schedule yet."""
        if self.num_early <= self.num_tokens:
            return np.zeros(0, np.int64)
        assert self.state.withheld is not None
        return self.state.withheld

    @property
    def is_cut(self) -> bool:
        """Whether cuts may drop tokens of this row."""
        return not self.state.is_unpruned and self.num_computed < self.state.prompt_len

    def kv_len(self, layer: int) -> int:
        """The tokens that a layer's cache holds already."""
        return self.state.kv_len(layer, self.num_computed)

    def cut(self, layer: int, hidden: Float[Tensor, "tokens features"]) -> Float[Tensor, "kept features"]:
        """The hidden states that enter a layer, of those that remained until there."""
        if not self.is_cut or layer not in self.state.runtime.cut_layers:
            return hidden
        if self.chunks is not None and layer >= self.chunks.late.held_layer:
            if len(hidden):  # it is the held layer
                self.chunks.hold(hidden)
                self.remaining = self.remaining[:0]
            return hidden[:0]
        if self.chunks is None and self.state.prefill is not None:
            return self._cut_by_scores(layer, hidden)
        assert isinstance(self.remaining, np.ndarray)
        positions = self.num_computed + self.remaining
        keep = np.ones(len(positions), bool)  # all tokens of an answer that runs again
        in_prompt = positions < self.state.prompt_len
        keep[in_prompt] = self.state.keep_masks[layer][positions[in_prompt]]
        self.remaining = self.remaining[keep]
        return hidden[upload(np.flatnonzero(keep), hidden.device)]

    def _cut_by_scores(self, layer: int, hidden: Float[Tensor, "tokens features"]) -> Float[Tensor, "kept features"]:
        prefill = self.state.prefill
        assert prefill is not None
        prompt, answer = hidden.split([prefill.slots.shape[1], hidden.shape[0] - prefill.slots.shape[1]])
        prompt = prefill.cut(layer, prompt[None])[0]
        answer_indices = torch.arange(self.state.prompt_len, self.num_tokens, device=hidden.device)
        self.remaining = torch.cat([prefill.slots[0], answer_indices])
        return torch.cat([prompt, answer])

    def signals(self, layer: int) -> frozenset[Signal]:
        """The signals that methods need of a layer's attention.

        Keys before the first cut are stored whatever its method, if other plans may find them in the prefix cache.
        """
        if not self.is_cut or not len(self.remaining):
            return frozenset()
        signals = frozenset(self.state.runtime.signals.get(layer, ()))
        if self.chunks is not None and self.state.max_reused is not None and layer == self.chunks.late.held_layer - 1:
            signals |= {Signal.KEYS}
        return signals

    def observe(
        self,
        layer: int,
        signals: Collection[Signal],
        query: Float[Tensor, "tokens heads head"],
        key: Float[Tensor, "tokens kv_heads head"],
        scaling: float | int,
    ) -> None:
        """Record signals of a layer from its attention's inputs, of this row's prompt."""
        if signals and self.chunks is not None:
            self.chunks.observe(signals, query, key, scaling)
        elif signals and (prefill := self.state.prefill) is not None:
            prefill.enter_layer(layer)
            length = prefill.slots.shape[1]
            q, k = (x[:length].transpose(0, 1)[None] for x in (query, key))
            prefill.observe(layer, signals, q, k, None, scaling)


class PackedBatch:
    """The rows of a batch and the tokens of them that remain.

    Withheld tokens follow the batch's own: their indices begin at `num_tokens`.
    """

    def __init__(self, rows: Sequence[BatchRow], device: torch.device) -> None:
        self.rows, self.device = rows, device
        self._starts = np.concatenate([[0], np.cumsum([row.num_tokens for row in rows])])
        self._withheld_starts = self.num_tokens + np.cumsum([0, *(len(row.withheld) for row in rows)])

    @property
    def is_cut(self) -> bool:
        """Whether cuts may drop tokens of this batch."""
        return any(row.is_cut for row in self.rows)

    @property
    def is_unpruned(self) -> bool:
        """Whether every layer keeps every token of all its requests."""
        return all(row.state.is_unpruned for row in self.rows)

    @property
    def cut_layers(self) -> tuple[int, ...]:
        """Layers that are cut for some request, in order."""
        states = [row.state for row in self.rows if not row.state.is_unpruned]
        layers = {layer for state in states for layer in state.runtime.cut_layers}
        return tuple(sorted(layers | {0} if self.is_uneven else layers))

    @property
    def is_uneven(self) -> bool:
        """Whether other tokens enter the first layer than vLLM has scheduled."""
        return any(row.num_early != row.num_tokens for row in self.rows)

    @property
    def withheld(self) -> Int[Tensor, " tokens"]:
        """The ids of the withheld tokens that run now."""
        return upload(np.concatenate([row.withheld for row in self.rows]), self.device)

    @property
    def withheld_positions(self) -> Int[Tensor, "*axes tokens"]:
        """Their positions."""
        rows = [(row.chunks, len(row.withheld)) for row in self.rows if len(row.withheld)]
        return torch.cat([chunks.positions[..., -count:] for chunks, count in rows if chunks is not None], -1)

    @property
    def num_tokens(self) -> int:
        """The tokens of the batch before any cut."""
        return int(self._starts[-1])

    def cut(self, layer: int, hidden: Float[Tensor, "tokens features"]) -> Float[Tensor, "kept features"]:
        """The hidden states that enter a layer."""
        row_hidden = hidden.split([len(row.remaining) for row in self.rows])
        return torch.cat([row.cut(layer, states) for row, states in zip(self.rows, row_hidden, strict=True)])

    def remaining(self) -> Int[Tensor, " kept"]:
        """Indices, in the whole batch, of the tokens that no cut has dropped yet."""
        starts = zip(self._starts[:-1].tolist(), self._withheld_starts[:-1].tolist(), self.rows, strict=True)
        return torch.cat([self._indices(*one) for one in starts])

    def _indices(self, start: int, withheld_start: int, row: BatchRow) -> Int[Tensor, " kept"]:
        if isinstance(row.remaining, Tensor):
            return start + row.remaining
        withheld = withheld_start + row.remaining - row.num_tokens
        return upload(np.where(row.remaining < row.num_tokens, start + row.remaining, withheld), self.device)

    def uncut_tokens(self) -> Int[Tensor, " tokens"]:
        """Indices of the tokens of rows that no cut concerns."""
        spans = zip(self.rows, self._starts[:-1].tolist(), strict=True)
        tokens = [np.arange(start, start + row.num_tokens) for row, start in spans if not row.is_cut]
        return upload(np.concatenate([np.zeros(0, np.int64), *tokens]), self.device)

    def set_aside_uncut(self) -> None:
        """Leave out the rows that no cut concerns, as they have run."""
        for row in self.rows:
            if not row.is_cut:
                row.num_early, row.remaining = 0, np.arange(0)

    def last_index(self, row: int) -> int:
        """The index of the last token that vLLM has scheduled of a row."""
        return int(self._starts[row + 1]) - 1

    def geometry(self, layer: int) -> Geometry:
        """Where the remaining tokens are in a layer."""
        return geometry([len(row.remaining) for row in self.rows], [row.kv_len(layer) for row in self.rows])

    def signals(self, layer: int) -> frozenset[Signal]:
        """The signals that methods need of a layer's attention."""
        return frozenset[Signal]().union(*(row.signals(layer) for row in self.rows))

    def observe(
        self,
        layer: int,
        signals: Collection[Signal],
        query: Float[Tensor, "tokens heads head"],
        key: Float[Tensor, "tokens kv_heads head"],
        scaling: float | int,
        *,
        in_chunks: bool,
    ) -> None:
        """Record signals of a layer from its attention's inputs, for the rows whose methods need them.

        in_chunks: for which rows, those of prompts in chunks or the others.
        """
        sizes = [len(row.remaining) for row in self.rows]
        total = sum(sizes)
        rows = list(zip(self.rows, query[:total].split(sizes), key[:total].split(sizes), strict=True))
        for row, _, k in rows:
            if in_chunks and row.chunks is not None and row.signals(layer):
                row.chunks.store_keys(k)
        for row, q, k in rows:
            if (row.chunks is not None) is in_chunks:
                row.observe(layer, row.signals(layer).intersection(signals), q, k, scaling)

    def average(self, layer: int, signals: Collection[Signal], mean: Callable[[Tensor], Tensor]) -> None:
        """Replace recorded signals of a layer by their mean over ranks, in one call for all rows."""
        entries = [
            (row.state.prefill, signal)
            for row in self.rows
            for signal in sorted(row.signals(layer).intersection(signals))
            if row.state.prefill is not None and row.chunks is None
        ]
        if not entries:
            return
        scores = [prefill.signals[signal] for prefill, signal in entries]
        means = mean(torch.cat(scores, 1)).split([row.shape[1] for row in scores], 1)
        for (prefill, signal), row in zip(entries, means, strict=True):
            prefill.replace_signal(signal, row)


def upload(array: Int[np.ndarray, " n"], device: torch.device) -> Int[Tensor, " n"]:
    """Copy an array to a device without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
