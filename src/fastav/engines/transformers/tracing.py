"""Tracing the attention of a prefill without maps: queries and keys are recorded, rows are computed afterwards."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastav.decoding.settings import greedy_settings
from fastav.engines.transformers.devices import input_device
from fastav.engines.transformers.hooks import prune
from fastav.engines.transformers.timing import Stopwatch
from fastav.layout import Layout
from fastav.pruning.compiled import CompiledPlan
from fastav.pruning.device_layout import question_mask
from fastav.pruning.rollout import LayerAttention, rollout_rows
from fastav.trace import Trace


def trace(model: Any, compiled: CompiledPlan, inputs: Mapping[str, Any], layout: Layout, alpha: float) -> Trace:
    """Prefill one prompt under a plan, and record its attention.

    The host stores queries and keys of all layers: besides the model, the device holds those of one layer and a block
    of its map. inputs: from `ModelAdapter.prepare`, on the model's device.
    """
    device = input_device(model)
    watch = Stopwatch(device)
    layers: list[LayerAttention] = []
    masks: dict[int, tuple[Tensor, Tensor]] = {}  # by id: each mask, held so that no other gets its id, and its copy

    def record(attention: LayerAttention) -> None:
        mask = attention.mask
        if mask is not None and id(mask) not in masks:
            masks[id(mask)] = (mask, mask.cpu())
        host_mask = None if mask is None else masks[id(mask)][1]
        layers.append(attention._replace(mask=None).to("cpu")._replace(mask=host_mask))

    with prune(model, compiled, layouts=[layout]) as pruning:
        start = watch.now()
        with pruning.observe(record):
            model.generate(**inputs, **greedy_settings(), stop_strings=None, max_new_tokens=1)
        end = watch.now()
        rows = rollout_rows(layers, starts(layout).to(device), alpha=alpha)
        attention, rollout = (part[:, 0, :, :-1].transpose(0, 1).cpu().numpy() for part in rows)
        return Trace(
            layout=layout,
            attention=attention,
            rollout=rollout,
            selections=tuple((layer, slots[0].cpu().numpy()) for layer, slots in pruning.slots()[1:]),
            seconds={"prefill": watch.between(start, end), "rollout": watch.between(end, watch.now())},
        )


def starts(layout: Layout) -> Float[Tensor, "1 3 columns"]:
    """The weight of every token as a query, for each of `fastav.trace.QUERIES`, with one more column."""
    last = torch.arange(len(layout)) == len(layout) - 1
    queries = torch.stack([last, torch.from_numpy(question_mask(layout)), torch.ones_like(last)]).float()
    return torch.nn.functional.pad(queries / queries.sum(1, keepdim=True), (0, 1))[None]
