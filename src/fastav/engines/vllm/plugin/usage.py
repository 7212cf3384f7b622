"""What a plan keeps of one prompt, counted in the process that a request arrives in.

All of it follows from the prompt's layout, so that no number travels back from the scheduler or the workers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import ceil
from typing import Any

from fastav.engines.vllm.plugin.kv_groups import example_layout, kv_groups
from fastav.engines.vllm.plugin.request_state import PlanRuntime
from fastav.flops import Saving, kv_bytes, prefill_flops
from fastav.layout import Layout
from fastav.pruning import decoder_layers

_collected: ContextVar["list[PromptUsage] | None"] = ContextVar("fastav_usage", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptUsage:
    """What a plan keeps of one prompt.

    plan: its name. prompt_tokens: by modality. tokens_per_layer: by modality, or by a pool's name where only scores
    decide which modality is kept. kv_blocks: of the KV cache, all groups of layers together.
    """

    plan: str
    prompt_tokens: Mapping[str, int]
    tokens_per_layer: Sequence[Mapping[str, int]]
    flops: Saving
    kv_bytes: Saving
    kv_blocks: Saving

    @property
    def layer_tokens(self) -> Saving:
        """Tokens that the layers run on, together."""
        full = sum(self.prompt_tokens.values()) * len(self.tokens_per_layer)
        return Saving(full, sum(sum(layer.values()) for layer in self.tokens_per_layer))

    def to_dict(self) -> dict[str, Any]:
        """The usage as a JSON object, with the names that `fastav serve` has."""
        return {
            "plan": self.plan,
            "prompt_tokens": dict(self.prompt_tokens),
            "tokens_per_layer": [dict(layer) for layer in self.tokens_per_layer],
            "flops": self.flops.to_dict(),
            "kv_bytes": self.kv_bytes.to_dict(),
            "kv_blocks": self.kv_blocks.to_dict(),
        }


class UsageCounter:
    """Counts what plans keep of prompts, on one server.

    runtime: of the server's plan, which the groups of the KV cache are chosen for. itemsize: bytes per number in the
    cache. cache_config: vLLM's, whose block size is known once the engine has started.
    """

    def __init__(self, runtime: PlanRuntime, max_len: int, itemsize: int, cache_config: Any) -> None:
        pruning, self._cache_config, self._itemsize = runtime.pruning, cache_config, itemsize
        self._shape = pruning.adapter.shape(pruning.config)
        kv_lens = pruning.plan.tokens(example_layout(runtime, max_len), runtime.depth)
        # vLLM has other kinds of cache for windows, which are not divided into groups
        self._first_layers = (0,) if any(decoder_layers.windows(pruning.text)) else kv_groups(kv_lens)

    def usage(self, runtime: PlanRuntime, layout: Layout, kv_lens: Sequence[int]) -> PromptUsage:
        """What a plan keeps of a prompt.  kv_lens: as `PlanRuntime.count` gives them."""
        plan, full, size = runtime.pruning.plan, [len(layout)] * runtime.depth, self._cache_config.block_size
        blocks = [sum(ceil(lens[first] / size) for first in self._first_layers) for lens in (full, kv_lens)]
        return PromptUsage(
            plan=plan.name or plan.fingerprint,
            prompt_tokens=layout.by_modality(),
            tokens_per_layer=plan.by_layer(layout, runtime.depth),
            flops=Saving(prefill_flops(self._shape, full), prefill_flops(self._shape, kv_lens)),
            kv_bytes=Saving(*(kv_bytes(self._shape, lens, self._itemsize) for lens in (full, kv_lens))),
            kv_blocks=Saving(*blocks),
        )


@contextmanager
def collecting() -> Iterator[list[PromptUsage]]:
    """A list to which the usage of every prompt is added that this context's request brings."""
    usages: list[PromptUsage] = []
    token = _collected.set(usages)
    try:
        yield usages
    finally:
        _collected.reset(token)


def collect(usage: PromptUsage) -> None:
    """Add the usage of a prompt to the list of the HTTP request that it came with, if there is one."""
    if (usages := _collected.get()) is not None:
        usages.append(usage)


def merged(usages: Sequence[PromptUsage]) -> dict[str, Any] | None:
    """The usage of all prompts of one response, as a JSON object; None if none is known.

    As in vLLM's own usage, the numbers of several prompts are added. They have one plan, which the request names.
    """
    if not usages:
        return None
    first, *others = (usage.to_dict() for usage in usages)
    for other in others:
        first["prompt_tokens"] = _added(first["prompt_tokens"], other["prompt_tokens"])
        pairs = zip(first["tokens_per_layer"], other["tokens_per_layer"], strict=True)
        first["tokens_per_layer"] = [_added(one, another) for one, another in pairs]
        for name in ("flops", "kv_bytes", "kv_blocks"):
            full, pruned = (first[name][part] + other[name][part] for part in ("full", "pruned"))
            first[name] = Saving(full, pruned).to_dict()
    return first


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
