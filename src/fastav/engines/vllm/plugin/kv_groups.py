"""Division of the layers into groups of the KV cache, each sized by what its first layer keeps."""

from collections.abc import Sequence

from fastav.engines.vllm import guards
from fastav.engines.vllm.guards import PruningConfig
from fastav.engines.vllm.plugin.request_state import PlanRuntime
from fastav.layout import Layout, Modality

MAX_GROUPS = 4  # each group has a block table and attention metadata of its own in every step
TEXT_TOKENS = 64  # of a typical question, with the chat template around it


def kv_groups(
    kv_lens: Sequence[int], max_groups: int = MAX_GROUPS, min_groups: int = 1, boundary: int = 0
) -> tuple[int, ...]:
    """The first layer of each group, for the division into equal groups that stores a prompt in the fewest slots.

    Of equal divisions, the one with the fewest groups. kv_lens: tokens of the prompt that each layer keeps, which never
    grow from layer to layer. min_groups: the least number, if the layers can be divided so. boundary: a layer that must
    be the first of a group (`can_divide_at`), or the depth.
    """
    n_layers = len(kv_lens)
    numbers = [n for n in range(1, max_groups + 1) if n_layers % n == 0 and boundary % (n_layers // n) == 0]
    divisions = [range(0, n_layers, n_layers // n) for n in numbers if n >= min(min_groups, numbers[-1])]
    return tuple(min(divisions, key=lambda firsts: sum(kv_lens[first] for first in firsts) * firsts.step))


def can_divide_at(layer: int, depth: int, max_groups: int = MAX_GROUPS) -> bool:
    """Whether a layer can be the first of a group, or is the depth."""
    return any(depth % n == 0 and layer % (depth // n) == 0 for n in range(1, max_groups + 1))


def needs_no_prefixes(pruning: PruningConfig, chunked_prefill: bool) -> str | None:
    """Why no prompt can reuse the blocks of a prefix; None if prompts can."""
    if not chunked_prefill:
        return "the rest of a prompt is a chunk of it, and chunked prefill is off"
    layer = pruning.compiled.first_layer
    if reason := guards.needs_late_cuts(pruning, layer):
        return reason
    if not can_divide_at(layer, pruning.depth):
        return f"the layers before the first cut, at {layer}, are not whole groups of the KV cache, which are equal"
    return None


def example_layout(runtime: PlanRuntime, max_len: int) -> Layout:
    """The layout of a typical prompt of the model, with less audio and video if it would exceed `max_len` tokens."""
    pruning, text = runtime.pruning, min(TEXT_TOKENS, max_len)
    typical = pruning.adapter.example(pruning.config, text=text)
    if len(typical) <= max_len:
        return typical
    audio, video = (
        typical.count(kind) * (max_len - text) // (len(typical) - text) for kind in (Modality.AUDIO, Modality.VIDEO)
    )
    return pruning.adapter.example(pruning.config, text=text, audio=audio, video=video)
