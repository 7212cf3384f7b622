"""Whether a prefill did what its plan says, told by the tokens that every layer's cache holds.

Shapes alone are looked at, so that nothing waits for a device.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.cache_utils import Cache

from fastav.engines.transformers.kv_cache import PrunedLayer
from fastav.pruning.state import PruningState
from fastav.pruning.verification import not_applied, require_applied


def check_prefill(state: PruningState, args: Iterable[Any], kwargs: Mapping[str, Any], output: Any) -> None:
    """Compare what layers ran on and what their caches hold with the plan's counts of the batch's layouts.

    A cache is looked for by its type, in what the model was called with (`args`, `kwargs`) and in its `output`, so that
    it is found by whatever name. Without one only what layers ran on is compared.

    Raises: PlanNotApplied.
    """
    planned = _runs_on(state)
    known = [state.layer_tokens[layer].slots.shape[1] for layer in range(len(planned)) if layer in state.layer_tokens]
    require_applied(planned, known, "input holds {} tokens")
    returned = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    caches = [value for value in (*args, *kwargs.values(), *returned) if isinstance(value, Cache)]
    if caches:
        _check_cache(state, planned, caches[-1])


def _runs_on(state: PruningState) -> list[int]:
    """Columns that every layer runs on, the longest row's, by the plan."""
    left = {layer: counts.width for (layer, _), counts in zip(state.compiled.cuts, state.counts, strict=False)}
    planned, now = [], state.length
    for layer in range(state.compiled.depth):
        now = left.get(layer, now)
        planned.append(now)
    return planned


def _check_cache(state: PruningState, runs_on: list[int], cache: Cache) -> None:
    compiled = state.compiled
    planned = runs_on[: compiled.n_kv_layers]
    layers: list[Any] = cache.layers[: compiled.n_kv_layers]
    for number, (layer, _) in enumerate(compiled.cache_cuts, len(compiled.cuts)):
        planned[layer] = state.counts[number].width
    held = [0 if layer.keys is None else layer.keys.shape[-2] for layer in layers]
    for index in range(min(len(layers), compiled.first_layer)):
        if getattr(layers[index], "is_sliding", False):
            planned[index] = held[index]  # transformers' own window; nothing was to be dropped here
    for index in range(compiled.first_layer, len(planned)):
        if (window := compiled.windows[index]) is not None and window > 1:
            planned[index] = min(planned[index], window - 1)  # as `PrunedLayer`: a query sees itself besides
    require_applied(planned, held)
    for index, layer in enumerate(layers[compiled.first_layer :], compiled.first_layer):
        if not isinstance(layer, PrunedLayer) or layer.slots.shape[1] != held[index]:
            raise not_applied(f"layer {index}'s cache does not tell which tokens it holds")
