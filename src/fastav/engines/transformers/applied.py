"""Whether a prefill did what its plan says, told by the tokens that every layer's cache holds.

Shapes alone are looked at, so that nothing waits for a device.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.cache_utils import Cache

from fastav.engines.transformers.cache import PrunedLayer
from fastav.engines.transformers.prefill import Prefill
from fastav.plan_check import not_applied, require_applied


def check_prefill(state: Prefill, args: Iterable[Any], kwargs: Mapping[str, Any], output: Any) -> None:
    """Compare what layers ran on and what their caches hold with the plan's counts of the batch's layouts.

    A cache is looked for by its type, in what the model was called with (`args`, `kwargs`) and in its `output`, so that
    it is found by whatever name. Without one only what layers ran on is compared.

    Raises: PlanNotApplied.
    """
    planned = _runs_on(state)
    known = [state.stored[layer].slots.shape[1] for layer in range(len(planned)) if layer in state.stored]
    require_applied(planned, known, "input holds {} tokens")
    returned = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    caches = [value for value in (*args, *kwargs.values(), *returned) if isinstance(value, Cache)]
    if caches:
        _check_cache(state, planned, caches[-1])


def _runs_on(state: Prefill) -> list[int]:
    """Columns that every layer runs on, the longest row's, by the plan."""
    left = {layer: state.widths[number][0] for number, (layer, _) in enumerate(state.schedule.cuts)}
    planned, now = [], state.length
    for layer in range(state.schedule.depth):
        now = left.get(layer, now)
        planned.append(now)
    return planned


def _check_cache(state: Prefill, runs_on: list[int], cache: Cache) -> None:
    schedule = state.schedule
    planned = runs_on[: schedule.owners]
    layers: list[Any] = cache.layers[: schedule.owners]
    for number, (layer, _) in enumerate(schedule.cache_cuts, len(schedule.cuts)):
        planned[layer] = state.widths[number][0]
    held = [0 if layer.keys is None else layer.keys.shape[-2] for layer in layers]
    for index in range(min(len(layers), schedule.first)):
        if getattr(layers[index], "is_sliding", False):
            planned[index] = held[index]  # transformers' own window; nothing was to be dropped here
    for index in range(schedule.first, len(planned)):
        if (window := schedule.windows[index]) is not None and window > 1:
            planned[index] = min(planned[index], window - 1)  # as `PrunedLayer`: a query sees itself besides
    require_applied(planned, held)
    for index, layer in enumerate(layers[schedule.first :], schedule.first):
        if not isinstance(layer, PrunedLayer) or layer.slots.shape[1] != held[index]:
            raise not_applied(f"layer {index}'s cache does not tell which tokens it holds")
