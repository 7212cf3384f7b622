"""The cache of keys and values in parts, each with blocks for the tokens that its layers hold of a prompt, and no more.

vLLM gives the layers of a model that are alike one table of blocks, as long as the prompt. Here layers that follow each
other are told apart by the part that they are in, so that each part has a table of its own, and how many tokens a part
holds of a prompt the plan says before it runs. All parts have as many layers, so that they share one pool of blocks.

What is used beyond vLLM's documented interfaces: specs of the cache and their registry, the manager of full attention,
and where schedulers take requests and let them go.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from math import ceil
from typing import Any

from vllm.logger import init_logger  # pyright: ignore[reportMissingImports]
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # pyright: ignore[reportMissingImports]
from vllm.v1.core.sched.scheduler import Scheduler  # pyright: ignore[reportMissingImports]
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager  # pyright: ignore[reportMissingImports]
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec  # pyright: ignore[reportMissingImports]
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry  # pyright: ignore[reportMissingImports]

from fastav.engines.vllm.internals import computed_before, plans, prompt_of, said_by
from fastav.engines.vllm.parts import parts
from fastav.engines.vllm.passage import Passage, Passages
from fastav.layout import Layout, Modality
from fastav.plan_check import not_applied

TEXT = 64  # tokens of a typical question, with what stands around it
log = init_logger("vllm.fastav")


@dataclass(frozen=True, kw_only=True)
class PartSpec(FullAttentionSpec):
    """The cache of the layers of one part.  first: the first of them, which holds most."""

    first: int

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One spec for layers of one part.  Raises: AssertionError for others, on which vLLM keeps them apart."""
        return KVCacheSpec.merge.__func__(cls, specs)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Whether all of these layers are of this part."""
        return all(spec == self for spec in kv_cache_specs.values())


class PartManager(FullAttentionManager):
    """Gives requests blocks for what the layers of one part hold of them."""

    passages: Mapping[str, Passage] = {}

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *rest: Any, **named: Any) -> int:
        """How many blocks are missing for the first `num_tokens` of prompt and answer."""
        return super().get_num_blocks_to_allocate(request_id, self._held(request_id, num_tokens), *rest, **named)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *rest: Any, **named: Any) -> Any:
        """Those blocks."""
        return super().allocate_new_blocks(request_id, self._held(request_id, num_tokens), *rest, **named)

    def _held(self, request: str, tokens: int) -> int:
        return self.passages[request].before(self.kv_cache_spec.first, tokens)


KVCacheSpecRegistry._ensure_registered()  # vLLM's own, which it leaves out once there is another
KVCacheSpecRegistry.register(PartSpec, PartManager, PartSpec)


def in_parts(specs: Mapping[str, Any], names: Sequence[str], made: Passages, longest: int) -> dict[str, Any]:
    """Specs of a model's cache, the decoder's in parts.

    names: its layers, in order. made: by the server's plan. longest: tokens that a prompt may have.
    """
    firsts = parts(made.asked.plan.tokens(_example(made, longest), made.depth))
    if len(firsts) == 1 or any(type(specs[name]) is not FullAttentionSpec for name in names):
        return dict(specs)  # other kinds of cache stay as they are
    found = dict(specs)
    for index, name in enumerate(names):
        first = max(first for first in firsts if first <= index)
        shared = {field.name: getattr(specs[name], field.name) for field in fields(FullAttentionSpec) if field.init}
        found[name] = PartSpec(**shared, first=first)
    return found


def _example(made: Passages, longest: int) -> Layout:
    """A typical prompt of the model, of less audio and video if it would be too long."""
    asked, text = made.asked, min(TEXT, longest)
    typical = asked.adapter.example(asked.config, text=text)
    if len(typical) <= longest:
        return typical
    audio, video = (
        typical.count(kind) * (longest - text) // (len(typical) - text) for kind in (Modality.AUDIO, Modality.VIDEO)
    )
    return asked.adapter.example(asked.config, text=text, audio=audio, video=video)


@cache
def _counting(kind: type[Scheduler]) -> type[Scheduler]:
    """A scheduler that knows of its requests how many tokens their layers hold."""

    class PruningScheduler(kind):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            self.passages: dict[str, Passage] = {}
            self._plans = plans(self.vllm_config)
            managers = self.kv_cache_manager.coordinator.single_type_managers
            for manager in managers:
                manager.passages = self.passages
            example = _example(self._plans.default, self.max_model_len)
            specs = [manager.kv_cache_spec for manager in managers]
            _tell(self._plans.default, example, specs, self.kv_cache_manager.block_pool.get_num_free_blocks())

        def add_request(self, request: Any) -> None:
            made = self._plans.of(said_by(request.sampling_params))
            self.passages[request.request_id] = made.of(prompt_of(request, made))
            super().add_request(request)

        def schedule(self, *rest: Any, **named: Any) -> Any:
            step = super().schedule(*rest, **named)
            self._require_blocks(step)
            return step

        def _require_blocks(self, step: Any) -> None:
            """Refuse a step in which a part would have more or fewer blocks than it holds.  Raises: PlanNotApplied."""
            computed = computed_before(step)
            parts = [one for one in self.kv_cache_manager.coordinator.single_type_managers if type(one) is PartManager]
            for name, tokens in step.num_scheduled_tokens.items():
                for part in parts:
                    first, size = part.kv_cache_spec.first, part.kv_cache_spec.block_size
                    held = self.passages[name].before(first, computed[name] + tokens)
                    if (blocks := len(part.req_to_blocks[name])) != ceil(held / size):
                        raise not_applied(f"layer {first} has {blocks} blocks of {size} for a request of {held} tokens")

        def _free_blocks(self, request: Any) -> None:
            super()._free_blocks(request)
            del self.passages[request.request_id]

    return PruningScheduler


def scheduler(vllm_config: Any, **named: Any) -> Any:
    """The scheduler that the configuration asks for, which counts."""
    kind = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return _counting(kind)(vllm_config=vllm_config, **named)


def _tell(made: Passages, example: Layout, specs: Sequence[Any], free: int) -> None:
    """Log how many typical prompts there is room for; vLLM's own figure is of prompts that nothing is dropped of."""
    held = made.asked.plan.tokens(example, made.depth)
    whole = sum(ceil(len(example) / spec.block_size) for spec in specs)
    needed = sum(ceil(held[getattr(spec, "first", 0)] / spec.block_size) for spec in specs)
    counts = (f"{count:,}" for count in (len(example), needed, whole))
    room = "fastav: a typical prompt of %s tokens takes %s blocks, not %s: there is room for %.1f at once, not %.1f"
    log.info(room, *counts, free / needed, free / whole)
