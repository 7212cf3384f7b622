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

    calls: of each layer's attention. num_slots: of each layer, how many cache slots were to be written.
    """

    def __init__(self, depth: int) -> None:
        self.calls: list[list[AttentionCall]] = [[] for _ in range(depth)]
        self.num_slots = [0] * depth

    def clear(self) -> None:
        """Begin a step."""
        for calls in self.calls:
            calls.clear()
        self.num_slots = [0] * len(self.num_slots)

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
            self.num_slots[layer] += tokens

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
            self.num_slots[layer] += len(slots)
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

    seq_lens: tokens of each request in each layer's cache after it. query_lens: those that the step runs. total: tokens
    that it runs before any cut.
    """

    seq_lens: Int[np.ndarray, "requests layers"]
    query_lens: Int[np.ndarray, "requests layers"]
    total: int

    @classmethod
    def of(
        cls, states: Sequence[RequestState], num_computed: Sequence[int], num_tokens: Sequence[int]
    ) -> "ExpectedStep":
        """The step of these requests.

        num_computed: tokens of each that have run before. num_tokens: how many run now, before any cut.
        """
        before = np.stack([state.kv_lens(done) for state, done in zip(states, num_computed, strict=True)])
        triples = zip(states, num_computed, num_tokens, strict=True)
        after = np.stack([state.kv_lens(done + new) for state, done, new in triples])
        return cls(seq_lens=after, query_lens=after - before, total=sum(num_tokens))


def require_step(expected: ExpectedStep, record: StepRecord) -> None:
    """Refuse to go on from a step in which a layer ran on other tokens than the plan says.

    Raises: PlanNotApplied.
    """
    tokens = expected.query_lens.sum(0)
    # a piece of a prompt may leave later layers without tokens
    require_applied((tokens > 0).astype(int).tolist(), [len(calls) for calls in record.calls], "attention ran {} times")
    calls = [calls[0] if calls else NO_CALL for calls in record.calls]
    seq_lens = np.where(expected.query_lens > 0, expected.seq_lens, 0)
    # padding may add rows to layers that run on every token
    queries, slots = (
        np.where(tokens < expected.total, counts, np.minimum(counts, tokens)).tolist()
        for counts in ([call.num_queries for call in calls], record.num_slots)
    )
    for planned, recorded, what in (
        (tokens, [call.num_actual_tokens for call in calls], "attention metadata has {} tokens"),
        (tokens, queries, "attention was given {} tokens"),
        (tokens, slots, "cache was given {} tokens"),
        (expected.query_lens.max(0), [call.max_query_len for call in calls], "attention got {} tokens of one prompt"),
        (seq_lens.max(0), [call.max_seq_len for call in calls], "cache holds {} tokens of one request"),
    ):
        require_applied(planned.tolist(), recorded, what)
    for layer, call in enumerate(calls):
        planned = sorted(seq_lens[:, layer][expected.query_lens[:, layer] > 0].tolist())
        if call.seq_lens is not None and sorted(call.seq_lens) != planned:
            raise not_applied(
                f"layer {layer}'s cache holds {call.seq_lens} tokens of requests, and by the plan {planned}"
            )
