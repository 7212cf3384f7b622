"""Checks that a step of vLLM ran as the plan says: the inputs of attention, layer by layer, against the layouts.

The expected counts come from the plan, the layouts and vLLM's scheduler; the recorded ones from the calls of each
layer's attention, after all that pruning changes. Both are host integers, so that no step waits for its device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from fastav.engines.vllm.plugin.request_state import RequestState
from fastav.pruning.verification import not_applied, require_applied


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One call of a layer's attention, with vLLM's terms.

    num_queries: with those that only pad the batch. num_actual_tokens: without. max_query_len: the most tokens of one
    request. max_seq_len: the most tokens that the cache holds of one request, these included. seq_lens: those of every
    request, where they are known without waiting for the device.
    """

    num_queries: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    seq_lens: tuple[int, ...] | None = None


NO_CALL = AttentionCall(num_queries=0, num_actual_tokens=0, max_query_len=0, max_seq_len=0)


class StepRecord:
    """What the decoder's layers were given in one step.

    calls: of each layer's attention. num_slots: of each layer, how many cache slots each call was to write. is_split:
    whether requests that no cut concerns ran before the others.
    """

    is_split = False

    def __init__(self, depth: int) -> None:
        self.calls: list[list[AttentionCall]] = [[] for _ in range(depth)]
        self.num_slots: list[list[int]] = [[] for _ in range(depth)]

    def clear(self) -> None:
        """Begin a step."""
        for one in (*self.calls, *self.num_slots):
            one.clear()
        self.is_split = False

    def replay(
        self, seq_lens: Int[np.ndarray, "layers requests"], is_stored: Bool[np.ndarray, "layers requests"]
    ) -> None:
        """Record a step that calls no attention, as it replays a graph of the whole model, by what the graph reads.

        seq_lens: tokens of each request in each layer's cache. is_stored: whether the request's one token is among
        them.
        """
        for layer, calls in enumerate(self.calls):
            lens, tokens = seq_lens[layer][is_stored[layer]].tolist(), int(is_stored[layer].sum())
            if tokens:
                calls.append(
                    AttentionCall(
                        num_queries=tokens,
                        num_actual_tokens=tokens,
                        max_query_len=1,
                        max_seq_len=max(lens),
                        seq_lens=tuple(lens),
                    )
                )
            self.num_slots[layer].append(tokens)

    def attach(self, attention: Any, layer: int) -> None:
        """Record from now on what a layer's attention implementation is given.

        Compiled and captured graphs leave attention out, so that this runs in every step.
        """
        forward, update = attention.forward, attention.do_kv_cache_update

        def recorded_forward(
            module: Any, query: Tensor, key: Any, value: Any, cache: Any, metadata: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if metadata is not None:  # as it is while vLLM profiles memory or compiles
                lens = metadata.seq_lens
                call = AttentionCall(
                    num_queries=len(query),
                    num_actual_tokens=metadata.num_actual_tokens,
                    max_query_len=metadata.max_query_len,
                    max_seq_len=metadata.max_seq_len,
                    seq_lens=tuple(lens.tolist()) if lens.device.type == "cpu" else None,
                )
                self.calls[layer].append(call)
                _require_tokens(call.num_actual_tokens, len(query), layer)
            return forward(module, query, key, value, cache, metadata, *args, **kwargs)

        def recorded_update(
            module: Any, key: Tensor, value: Tensor, cache: Any, slots: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            self.num_slots[layer].append(len(slots))
            _require_tokens(len(slots), len(key), layer)
            return update(module, key, value, cache, slots, *args, **kwargs)

        attention.forward, attention.do_kv_cache_update = recorded_forward, recorded_update


def _require_tokens(expected: int, tokens: int, layer: int) -> None:
    """Refuse to run a kernel that would read beyond its inputs.  Raises: PlanNotApplied."""
    if expected > tokens:
        raise not_applied(f"layer {layer} expects {expected} tokens and gets {tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedStep:
    """What the plan says of a step.

    seq_lens: tokens of each request in each layer's cache after the batch has run. query_lens: those that the batch
    runs. total: tokens that vLLM has scheduled. batches: the requests that run together, by their indices. slices: of
    each layer, the tokens of every late slice that runs after the batch, and the tokens of its request in the cache
    then.
    """

    seq_lens: Int[np.ndarray, "requests layers"]
    query_lens: Int[np.ndarray, "requests layers"]
    total: int
    batches: Sequence[Sequence[int]]
    slices: Sequence[Sequence[tuple[int, int]]]

    @classmethod
    def of(
        cls,
        states: Sequence[RequestState],
        num_computed: Sequence[int],
        num_tokens: Sequence[int],
        *,
        is_split: bool = False,
    ) -> "ExpectedStep":
        """The step of these requests.

        num_computed: tokens of each that have run before. num_tokens: how many run now, before any cut. is_split:
        whether those that no cut concerns run before the others.
        """
        rows = range(len(states))
        cut = [row for row in rows if not states[row].is_unpruned and num_computed[row] < states[row].prompt_len]
        batches = [[row for row in rows if row not in cut], cut] if is_split else [list(rows)]
        before = np.stack([state.kv_lens(done) for state, done in zip(states, num_computed, strict=True)])
        triples = list(zip(states, num_computed, num_tokens, strict=True))
        after = np.stack([state.kv_lens(done + new) for state, done, new in triples])
        slices: list[list[tuple[int, int]]] = [[] for _ in range(after.shape[1])]
        for row, (state, done, new) in enumerate(triples):
            if (late := state.late) is None or not state.comes_in_chunks(done, new):
                continue
            after[row, late.held_layer :] = before[row, late.held_layer :]  # the batch runs none of these
            for one in late.slices(done, new):
                stage = late.stages[one.stage]
                for layer in range(stage.first_layer, stage.end_layer):
                    slices[layer].append((one.end - one.start, one.end))
        query_lens, total = after - before, sum(num_tokens)
        return cls(seq_lens=after, query_lens=query_lens, total=total, batches=batches, slices=slices)


def require_step(expected: ExpectedStep, record: StepRecord) -> None:
    """Refuse to go on from a step in which a layer ran on other tokens than the plan says.

    Raises: PlanNotApplied.
    """
    # a piece of a prompt may leave later layers without tokens
    runs = np.stack([expected.query_lens[batch].sum(0) > 0 for batch in expected.batches]).astype(int)
    n_calls = [int(n) + len(slices) for n, slices in zip(runs.sum(0), expected.slices, strict=True)]
    require_applied(n_calls, [len(calls) for calls in record.calls], "attention ran {} times")
    require_applied(n_calls, [len(slots) for slots in record.num_slots], "cache was updated {} times")
    for index, batch in enumerate(expected.batches):
        places = runs[:index].sum(0).tolist()  # among the calls of each layer
        _require_batch(
            expected, record, list(batch), [n if run else None for n, run in zip(places, runs[index], strict=True)]
        )
    _require_slices(expected, record, runs.sum(0).tolist())


def _require_batch(expected: ExpectedStep, record: StepRecord, rows: list[int], places: Sequence[int | None]) -> None:
    """Compare one call of every layer.

    rows: the requests that it ran. places: its index among each layer's calls; None where it has no tokens.
    """
    query_lens = expected.query_lens[rows]
    tokens = query_lens.sum(0)
    seq_lens = np.where(query_lens > 0, expected.seq_lens[rows], 0)
    calls = [NO_CALL if n is None else calls[n] for calls, n in zip(record.calls, places, strict=True)]
    slots = [0 if n is None else slots[n] for slots, n in zip(record.num_slots, places, strict=True)]
    # padding may add rows to layers that run on every token
    queries, slots = (
        np.where(tokens < expected.total, counts, np.minimum(counts, tokens)).tolist()
        for counts in ([call.num_queries for call in calls], slots)
    )
    for planned, recorded, what in (
        (tokens, [call.num_actual_tokens for call in calls], "attention metadata has {} tokens"),
        (tokens, queries, "attention was given {} tokens"),
        (tokens, slots, "cache was given {} tokens"),
        (query_lens.max(0), [call.max_query_len for call in calls], "attention got {} tokens of one prompt"),
        (seq_lens.max(0), [call.max_seq_len for call in calls], "cache holds {} tokens of one request"),
    ):
        require_applied(planned.tolist(), recorded, what)
    for layer, call in enumerate(calls):
        planned = sorted(seq_lens[:, layer][query_lens[:, layer] > 0].tolist())
        if call.seq_lens is not None and sorted(call.seq_lens) != planned:
            raise not_applied(
                f"layer {layer}'s cache holds {call.seq_lens} tokens of requests, and by the plan {planned}"
            )


def _require_slices(expected: ExpectedStep, record: StepRecord, n_batches: Sequence[int]) -> None:
    """Compare what ran after the batch, whose order among requests is vLLM's.  n_batches: calls before, by layer."""
    for layer, (slices, first) in enumerate(zip(expected.slices, n_batches, strict=True)):
        planned = sorted((count, count, count, end, count) for count, end in slices)
        calls = zip(record.calls[layer][first:], record.num_slots[layer][first:], strict=True)
        recorded = sorted(
            (call.num_queries, call.num_actual_tokens, call.max_query_len, call.max_seq_len, slots)
            for call, slots in calls
        )
        if recorded != planned:
            raise not_applied(f"layer {layer} ran late slices of {recorded}, and by the plan {planned}")
