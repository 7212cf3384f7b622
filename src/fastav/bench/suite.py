"""Everything about one shape on one device, part by part."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from fastav.bench.measure import Row, Spread, measure
from fastav.bench.probes import CutCost, Stall, cut_cost, encode, stalls
from fastav.bench.workload import Shape, build, build_model, describe


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What was measured with one kind of attention and one batch size.

    encode: seconds of the encoders and projectors; None if the shape has none. cut: what one cut costs.
    """

    shape: dict[str, Any]
    attention: str
    batch: int
    encode: Spread | None
    rows: list[Row]
    cut: CutCost
    stalls: list[Stall]


def attentions(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Kinds of attention to measure, and why the others are not."""
    if device.type != "cuda":
        return ["sdpa"], {"flash_attention_2": "needs CUDA", "flash_attention_3": "needs CUDA"}
    there = {"flash_attention_2": is_flash_attn_2_available(), "flash_attention_3": is_flash_attn_3_available()}
    usable = [name for name, usable in there.items() if usable]
    return ["sdpa", *usable], {name: "not installed" for name in there if name not in usable}


def suite(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int, new_tokens: int) -> Iterator[Part]:
    """Measure one kind of attention and batch size after another.

    rounds: of prefills; a third as many of answers, which take longer, and at least two. new_tokens: 0 for no answers.
    """
    model, plans = build_model(shape, device, dtype), shape.plans()
    for attention in attentions(device)[0]:
        model.set_attn_implementation(attention)
        for batch in shape.batches:
            load = build(shape, model, batch)
            rows = measure(load, plans, rounds, max(2, rounds // 3), new_tokens)
            yield Part(
                shape=describe(shape, load),
                attention=attention,
                batch=batch,
                encode=encode(load, rounds),
                rows=rows,
                cut=cut_cost(load, rows[0].prefill.median, rounds),
                stalls=[stall for plan in plans for stall in stalls(load, plan)],
            )
