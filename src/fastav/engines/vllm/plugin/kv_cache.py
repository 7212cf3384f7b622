"""The KV cache in groups of layers, each with blocks for the tokens that its layers keep, and no more.

vLLM gives layers of the same kind one block table, as long as the prompt. Here consecutive layers form groups with a
block table of their own, and the plan says before a prompt runs how many tokens each group stores. All groups have as
many layers, so that they share one pool of blocks.

Prompts in chunks that scores select from, and prompts whose prefix is cached, hold hidden states until their last token
has run. These have groups of their own in the same pool, whose layers attend to nothing.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from math import ceil
from typing import Any

from fastav.engines.vllm.compat import FullAttentionManager, FullAttentionSpec, KVCacheSpec, KVCacheSpecRegistry
from fastav.engines.vllm.plugin.kv_groups import example_layout, kv_groups
from fastav.engines.vllm.plugin.request_state import PlanRuntime, RequestState
from fastav.errors import UnsupportedPlan


@dataclass(frozen=True, kw_only=True)
class KVGroupSpec(FullAttentionSpec):
    """The cache of one layer of a group.

    first_layer: the first layer of the group, which keeps most tokens. end_layer: the layer behind the last.
    """

    first_layer: int
    end_layer: int

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One spec for layers of one group.  Raises: AssertionError for layers of several groups, as vLLM expects."""
        return KVCacheSpec.merge.__func__(cls, specs)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Whether all of these layers are in this group."""
        return all(spec == self for spec in kv_cache_specs.values())


@dataclass(frozen=True, kw_only=True)
class HeldSpec(KVGroupSpec):
    """The cache of one layer that holds states, which has the memory of a layer's keys and values.

    is_buffer: whether these are the states between late steps, and not those that enter the held layer.
    """

    is_buffer: bool

    @property
    def prefix_cacheable(self) -> bool:
        """Whether requests with the same prefix can share blocks."""
        return not self.is_buffer


class KVGroupManager(FullAttentionManager):
    """Allocates blocks for the tokens that the layers of one group keep.

    request_states: by request id; the scheduler's own.
    """

    request_states: Mapping[str, RequestState] = {}

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """The number of blocks missing for the first `num_tokens` of prompt and answer."""
        return super().get_num_blocks_to_allocate(request_id, self._slots(request_id, num_tokens), *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """Allocate those blocks."""
        return super().allocate_new_blocks(request_id, self._slots(request_id, num_tokens), *args, **kwargs)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Let later requests find the blocks of a prefix, if all of the group's layers keep all of its tokens."""
        if self.is_reusable(request.request_id):
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    def is_reusable(self, request_id: str) -> bool:
        """Whether a request's blocks hold what a prefix's tokens alone decide."""
        state = self.request_states[request_id]
        if state.is_unpruned:
            return True
        return state.max_reused is not None and self.kv_cache_spec.end_layer <= len(state.keep_masks)

    def _slots(self, request_id: str, num_tokens: int) -> int:
        return self.num_blocks(request_id, num_tokens) * self.block_size

    def num_blocks(self, request_id: str, num_tokens: int) -> int:
        """The number of blocks that a request has for the first `num_tokens` of prompt and answer."""
        return ceil(
            self.request_states[request_id].kv_len(self.kv_cache_spec.first_layer, num_tokens) / self.block_size
        )


class HeldManager(KVGroupManager):
    """Allocates blocks for held states, and frees them when the prompt has run.

    at_once: ids of requests whose prompts run in one step; the scheduler's own.
    """

    at_once: Collection[str] = ()

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Let later requests find the states of a prefix, while the prompt runs."""
        if self.req_to_blocks.get(request.request_id):
            super().cache_blocks(request, min(num_tokens, request.num_prompt_tokens), *args, **kwargs)

    def is_reusable(self, request_id: str) -> bool:
        """Whether the states are those of a server's first cut."""
        return self.request_states[request_id].max_reused is not None and not self.kv_cache_spec.is_buffer

    def num_blocks(self, request_id: str, num_tokens: int) -> int:
        """The number of blocks for states; none if the prompt runs at once."""
        late = self.request_states[request_id].late
        if late is None or num_tokens > late.prompt_len or request_id in self.at_once:
            return 0
        if self.kv_cache_spec.is_buffer:
            return late.num_buffer_blocks(num_tokens, self.block_size)
        return late.num_prompt_blocks(num_tokens, self.block_size)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks of a prompt that has run."""
        late = self.request_states[request_id].late
        blocks = self.req_to_blocks.get(request_id)
        if blocks and late is not None and processed_computed_tokens >= late.prompt_len:
            self.block_pool.free_blocks(reversed(blocks))
            self.req_to_blocks[request_id] = []


KVCacheSpecRegistry._ensure_registered()  # vLLM's own specs, which it would not register after ours
KVCacheSpecRegistry.register(KVGroupSpec, KVGroupManager, KVGroupSpec)
KVCacheSpecRegistry.register(HeldSpec, HeldManager, HeldSpec)


def partition_kv_cache(
    specs: Mapping[str, Any], layer_names: Sequence[str], runtime: PlanRuntime, max_len: int, held_bytes: int
) -> dict[str, Any]:
    """The specs of a model's cache, with those of the decoder's layers divided into groups, and with layers for states.

    layer_names: of the decoder, in order. runtime: of the server's plan. max_len: tokens that a prompt may have.
    held_bytes: of each token whose states are held.
    """
    kv_lens = runtime.pruning.plan.tokens(example_layout(runtime, max_len), runtime.depth)
    reused = None if runtime.chunking is None else runtime.chunking.reused_layer
    first_layers = kv_groups(kv_lens, min_groups=1 if runtime.chunking is None else 2, boundary=reused or 0)
    if any(type(specs[name]) is not FullAttentionSpec for name in layer_names):
        if runtime.chunking is not None:
            raise UnsupportedPlan(
                "this decoder's layers have several kinds of KV cache, which hold no states of prompts in chunks",
                "--no-enable-chunked-prefill",
            )
        return dict(specs)  # other kinds of cache are not divided
    if len(first_layers) == 1 and runtime.chunking is None:
        return dict(specs)
    partitioned = dict(specs)
    for index, name in enumerate(layer_names):
        first_layer = max(first for first in first_layers if first <= index)
        common = {field.name: getattr(specs[name], field.name) for field in fields(FullAttentionSpec) if field.init}
        size = len(layer_names) // len(first_layers)
        partitioned[name] = KVGroupSpec(**common, first_layer=first_layer, end_layer=first_layer + size)
    if runtime.chunking is not None:
        partitioned |= _held_specs(partitioned[layer_names[0]], len(layer_names), len(first_layers), held_bytes)
    return partitioned


def _held_specs(spec: KVGroupSpec, depth: int, n_groups: int, held_bytes: int) -> dict[str, HeldSpec]:
    """The specs of as many layers as hold the states of a token, in whole groups, twice.

    spec: of a layer of the decoder.
    """
    common = {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec) if field.init}
    group_size, token_bytes = depth // n_groups, spec.page_size_bytes // spec.block_size
    count = ceil(held_bytes / (token_bytes * group_size)) * group_size
    specs: dict[str, HeldSpec] = {}
    for is_buffer in (False, True):
        held = HeldSpec(**common, first_layer=depth, end_layer=depth, is_buffer=is_buffer)
        # vLLM reads a layer's number in its name
        specs |= {f"fastav.held.{depth + len(specs) + index}": held for index in range(count)}
    return specs
