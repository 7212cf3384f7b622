"""A prefill in chunks whose tokens are selected by scores: held states, sums of attention, and the late stages."""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastav.engines.vllm.plugin.held_states import BlockStore, StateStore, TensorStore
from fastav.engines.vllm.plugin.late_schedule import LateSchedule, Slice
from fastav.engines.vllm.plugin.tensor_parallel import TensorParallel
from fastav.method import Signal
from fastav.pruning.attention import attention_rows
from fastav.pruning.state import WINDOW, PruningState
from fastav.pruning.verification import not_applied


class ChunkedPrefill:
    """One running prefill in chunks.

    A stage is a run of layers between two cuts; the layers before the first scored cut come before stage 0. Each
    produces states of its tokens, chunk by chunk or slice by slice: the hidden states that enter the next cut, and keys
    of the last layer if its method reads them or attention. The cut then selects among all of them.

    late: the schedule. positions: of all tokens of the prompt, [tokens] or [axes, tokens]. prompt: where the states
    that enter the held layer are. buffer: where those of later stages are, if they outlast a step. num_reused: tokens
    whose states were in the prefix cache.
    """

    def __init__(
        self,
        late: LateSchedule,
        prefill: PruningState,
        positions: Int[Tensor, "*axes tokens"],
        prompt: BlockStore,
        buffer: BlockStore,
        ranks: TensorParallel,
        total_kv_heads: int,
        num_reused: int,
    ) -> None:
        nothing = torch.empty(1, prefill.length, 0, device=prefill.slots.device)
        for layer in prefill.compiled.cut_layers:
            if layer < late.held_layer:  # by the layout alone
                nothing = prefill.cut(layer, nothing)
        self.late, self.positions = late, positions
        self._prefill, self._ranks, self._total_kv_heads = prefill, ranks, total_kv_heads
        self._prompt = prompt
        self._buffer: StateStore | None = buffer if late.buffer_len else None
        self._source: StateStore = prompt  # of the states that the current stage reads
        self._indices = prefill.slots[0]  # of its tokens in the source
        # the stage, its tokens, and how many have run
        self._stage, self._count, self._done = -1, int(late.held_lens[-1]), num_reused
        self._sums: dict[Signal, Tensor] = {}

    # --- before a cut

    def store_keys(self, key: Float[Tensor, "tokens kv_heads head"]) -> None:
        """Store the keys of the next tokens, of this rank's heads.

        All requests of a batch store theirs before any observes: one may reuse what another computes in the same step.
        """
        self._written.write_keys(self._done, key.flatten(1))

    def observe(
        self,
        signals: Collection[Signal],
        query: Float[Tensor, "tokens heads head"],
        key: Float[Tensor, "tokens kv_heads head"],
        scaling: float | int,
    ) -> None:
        """Record what the next cut reads of a layer's attention.

        query, key: of this rank's heads, of the next tokens, whose keys are stored.
        """
        lengths = {
            Signal.LAST_QUERY: 1,
            Signal.WINDOW: WINDOW,
            Signal.TEXT_QUERIES: self._prefill.max_question_len,
        }
        n_queries = max((length for signal, length in lengths.items() if signal in signals), default=0)
        first, shape = max(0, self._count - n_queries - self._done), (-1, *key.shape[1:])
        if first >= len(key):
            return
        keys = self._written.keys(self._done + len(key)).view(shape)
        q, k = (x.transpose(0, 1)[None] for x in (query, keys))
        rows = attention_rows(q, k, None, None, scaling, first=first)[0]
        for signal, weight in self._weights(signals, len(key)).items():
            if signal not in self._sums:
                self._sums[signal] = torch.zeros(1, self._count, device=query.device)
            self._sums[signal][0, : len(keys)] += weight[first:] @ rows

    def _weights(self, signals: Collection[Signal], count: int) -> dict[Signal, Float[Tensor, " tokens"]]:
        """The weights of the next tokens' queries, for every signal of attention."""
        places = torch.arange(self._done, self._done + count, device=self._prefill.slots.device)
        weights = dict[Signal, Tensor]()
        if Signal.LAST_QUERY in signals:
            weights[Signal.LAST_QUERY] = (places == self._count - 1).float()
        if Signal.WINDOW in signals:
            weights[Signal.WINDOW] = (places >= self._count - WINDOW).float()
        if Signal.TEXT_QUERIES in signals:
            weights[Signal.TEXT_QUERIES] = self._prefill.layout.question[0, self._prefill.slots[0, places]].float()
        return weights

    def hold(self, hidden: Float[Tensor, "tokens features"]) -> None:
        """Store the states of the next tokens, which enter the next cut."""
        self._written.write(self._done, hidden)
        self._done += len(hidden)

    @property
    def _written(self) -> StateStore:
        """Where the current stage's states go."""
        if self._stage < 0:
            return self._prompt
        assert self._buffer is not None
        return self._buffer

    # --- late stages

    def begin(self, one: Slice) -> None:
        """Make the cut of a slice's stage, if the slice is its first."""
        if one.stage == self._stage:
            return
        assert self._done == self._count, "a cut before all of its tokens have come"
        prefill, compiled = self._prefill, self._prefill.compiled
        layer = self.late.stages[one.stage].first_layer
        methods = [method for cut_layer, method in compiled.cuts if cut_layer == layer]
        needs = frozenset[Signal]().union(*(method.needs for method in methods))
        written = self._written
        for signal, total in self._sums.items():
            prefill.replace_signal(signal, self._ranks.mean(total / total.sum()))
        if Signal.KEYS in needs:
            keys = written.keys(self._count).view(self._count, -1, self._head_size)
            prefill.keys = self._ranks.gather_heads(keys, self._total_kv_heads).transpose(0, 1)[None]
        everything = torch.arange(self._count, device=prefill.slots.device)
        merges = any(method.merges for method in methods)
        if merges or Signal.HIDDEN_STATES in needs:
            states = written.hidden(everything)[None]
        else:
            states = torch.empty(1, self._count, 0, device=prefill.slots.device)
        before = prefill.slots[0]
        states = prefill.cut(layer, states)[0]
        self._source, self._indices = written, torch.searchsorted(before, prefill.slots[0])
        self._stage, self._count, self._done, self._sums = one.stage, len(prefill.slots[0]), 0, {}
        if self._count != (planned := self.late.stages[one.stage].num_tokens):
            raise not_applied(f"layer {layer} gets {self._count} tokens, and by the plan {planned}")
        if self._buffer is None:
            self._buffer = TensorStore(self._count, written.hidden(everything[:1]), written.keys(1).shape[1])
        if merges:
            self._source, self._indices = self._buffer, everything[: self._count]
            self._buffer.write(0, states)

    @property
    def _head_size(self) -> int:
        text: Any = self._prefill.compiled.config
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def states(self, one: Slice) -> Float[Tensor, "tokens features"]:
        """The hidden states that enter a slice's stage."""
        return self._source.hidden(self._indices[one.start : one.end])

    def positions_of(self, one: Slice) -> Int[Tensor, "*axes tokens"]:
        """The positions of a slice's tokens."""
        return self.positions[..., self._prefill.slots[0, one.start : one.end]]

    def signals(self, layer: int) -> frozenset[Signal]:
        """The signals that the next cut reads of a layer's attention."""
        return self._prefill.compiled.observed.get(layer, frozenset())
