"""Verification, by the tokens in every layer's cache, that a prefill followed its plan.

Only shapes are compared, so that nothing waits for a device.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.cache_utils import Cache

from fastav.engines.transformers.kv_cache import PrunedLayer, n_stored
from fastav.pruning.state import PruningState
from fastav.pruning.verification import not_applied, require_applied


def check_prefill(state: PruningState, args: Iterable[Any], kwargs: Mapping[str, Any], output: Any) -> None:
    """Compare the tokens that layers ran on, and those in their caches, with the plan's counts for the layouts.

    The cache is found by its type, under any name, among the model's arguments (`args`, `kwargs`) and in its `output`.
    Without a cache only the tokens that layers ran on are compared.

    Raises: PlanNotApplied.
    """
    planned = _runs_on(state)
    actual = [state.layer_tokens[layer].slots.shape[1] for layer in range(len(planned)) if layer in state.layer_tokens]
    require_applied(planned, actual, "input holds {} tokens")
    returned = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    caches = [value for value in (*args, *kwargs.values(), *returned) if isinstance(value, Cache)]
    if caches:
        _check_cache(state, planned, caches[-1])


def _runs_on(state: PruningState) -> list[int]:
    """The number of columns (of the longest row) that every layer runs on by the plan."""
    after_cut = {layer: counts.width for (layer, _), counts in zip(state.compiled.cuts, state.counts, strict=False)}
    planned: list[int] = []
    width = state.length
    for layer in range(state.compiled.depth):
        width = after_cut.get(layer, width)
        planned.append(width)
    return planned


def _check_cache(state: PruningState, runs_on: list[int], cache: Cache) -> None:
    compiled = state.compiled
    planned = runs_on[: compiled.n_kv_layers]
    layers: list[Any] = cache.layers[: compiled.n_kv_layers]
    until = compiled.earlier_caches_until
    planned[:until] = [runs_on[until]] * until
    for number, (layer, _) in enumerate(compiled.cache_cuts, len(compiled.cuts)):
        planned[layer] = state.counts[number].width
    for layer, tokens in enumerate(state.cached):
        planned[layer] += tokens.slots.shape[1]
    stored = [n_stored(layer) for layer in layers]
    for index in range(min(len(layers), compiled.first_layer)):
        if getattr(layers[index], "is_sliding", False):
            planned[index] = stored[index]  # transformers' own window; pruning drops nothing in this layer
    for index in range(compiled.first_layer, len(planned)):
        if (window := compiled.windows[index]) is not None and window > 1:
            planned[index] = min(planned[index], window - 1)  # as in `PrunedLayer`: a window includes the query itself
    require_applied(planned, stored)
    for index, layer in enumerate(layers[compiled.first_layer :], compiled.first_layer):
        if not isinstance(layer, PrunedLayer) or layer.slots.shape[1] != stored[index]:
            raise not_applied(f"layer {index}'s cache has no record of which tokens it holds")
