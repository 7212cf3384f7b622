"""The KV cache in groups of layers, each with blocks for the tokens that its layers keep, and no more.

vLLM gives layers of the same kind one block table, as long as the prompt. Here consecutive layers form groups with a
block table of their own, and the plan says before a prompt runs how many tokens each group stores. All groups have as
many layers, so that they share one pool of blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fastav.engines.vllm.compat import FullAttentionManager, FullAttentionSpec, KVCacheSpec, KVCacheSpecRegistry
from fastav.engines.vllm.plugin.kv_groups import example_layout, kv_groups
from fastav.engines.vllm.plugin.request_state import PlanRuntime, RequestState


@dataclass(frozen=True, kw_only=True)
class KVGroupSpec(FullAttentionSpec):
    """The cache of one layer of a group.  first_layer: the first layer of the group, which keeps most tokens."""

    first_layer: int

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One spec for layers of one group.  Raises: AssertionError for layers of several groups, as vLLM expects."""
        return KVCacheSpec.merge.__func__(cls, specs)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Whether all of these layers are in this group."""
        return all(spec == self for spec in kv_cache_specs.values())


class KVGroupManager(FullAttentionManager):
    """Allocates blocks for the tokens that the layers of one group keep.

    request_states: by request id; the scheduler's own.
    """

    request_states: Mapping[str, RequestState] = {}

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """The number of blocks missing for the first `num_tokens` of prompt and answer."""
        return super().get_num_blocks_to_allocate(request_id, self._kv_len(request_id, num_tokens), *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """Allocate those blocks."""
        return super().allocate_new_blocks(request_id, self._kv_len(request_id, num_tokens), *args, **kwargs)

    def _kv_len(self, request_id: str, num_tokens: int) -> int:
        return self.request_states[request_id].kv_len(self.kv_cache_spec.first_layer, num_tokens)


KVCacheSpecRegistry._ensure_registered()  # vLLM's own specs, which it would not register after ours
KVCacheSpecRegistry.register(KVGroupSpec, KVGroupManager, KVGroupSpec)


def partition_kv_cache(
    specs: Mapping[str, Any], layer_names: Sequence[str], runtime: PlanRuntime, max_len: int
) -> dict[str, Any]:
    """The specs of a model's cache, with those of the decoder's layers divided into groups.

    layer_names: of the decoder, in order. runtime: of the server's plan. max_len: tokens that a prompt may have.
    """
    first_layers = kv_groups(runtime.pruning.plan.tokens(example_layout(runtime, max_len), runtime.depth))
    if len(first_layers) == 1 or any(type(specs[name]) is not FullAttentionSpec for name in layer_names):
        return dict(specs)  # other kinds of cache are not divided
    partitioned = dict(specs)
    for index, name in enumerate(layer_names):
        first_layer = max(first for first in first_layers if first <= index)
        common = {field.name: getattr(specs[name], field.name) for field in fields(FullAttentionSpec) if field.init}
        partitioned[name] = KVGroupSpec(**common, first_layer=first_layer)
    return partitioned
