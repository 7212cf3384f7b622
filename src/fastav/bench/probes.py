"""What explains the numbers: the parts of a cut, waits for the device, the encoders, and the machine's own speed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from fastav.attention import last_query_attention
from fastav.bench.measure import Spread, timed
from fastav.bench.workload import ADAPTER, Workload
from fastav.engines.transformers.gather import take, take_positions
from fastav.method import select
from fastav.plan import Keep, Plan, Share, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class CutCost:
    """What one cut of 20 % of the media costs at full length, in seconds, against one layer of the unpruned prefill."""

    tokens: int
    score: Spread
    select: Spread
    gather: Spread
    layer: float

    @property
    def share(self) -> float:
        """Of the layer's time."""
        return (self.score.median + self.select.median + self.gather.median) / self.layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Whether a prefill waits for the device; of the unpruned one, that is transformers' own doing.

    prompt: `embeddings`, or `media`, which is encoded first. passed: None where there is no device to wait for.
    """

    plan: str
    prompt: str
    passed: bool | None
    error: str | None = None


@torch.inference_mode()
def encode(workload: Workload, rounds: int) -> Spread | None:
    """Seconds of the encoders and projectors; None if the shape has none."""
    if workload.raw is None:
        return None
    embed = partial(workload.model.model.embed, **workload.raw)
    return Spread.of([timed(workload.device, embed)[0] for _ in range(rounds + 1)][1:])


@torch.inference_mode()
def cut_cost(workload: Workload, prefill: float, rounds: int, calls: int = 10) -> CutCost:
    """What scoring, selecting and gathering cost, each by itself on tensors of the prefill's shapes.

    prefill: seconds of the unpruned one.
    """
    decoder, layout, device = ADAPTER.shape(workload.model.config), workload.layout, workload.device
    hidden, batch, n = workload.embeds, workload.batch, len(layout)
    fine = Step(layers="0", method="position", keep=Keep(media=Share(0.8)))
    (cut,) = Plan((fine,)).schedule(layout, decoder.layers)
    make = partial(torch.randn, device=device, dtype=hidden.dtype)
    query, key = (make(batch, heads, n, decoder.head_dim) for heads in (decoder.heads, decoder.kv_heads))
    rotary = make(2, 1, n, decoder.head_dim)
    modality = torch.as_tensor(np.array(layout.modality), device=device).long().expand(batch, n)
    slots = torch.arange(n, device=device).expand(batch, n)
    counts = [(pool, torch.full((batch,), count, device=device)) for pool, count in cut.counts.items()]
    scores = last_query_attention(query, key, None, None, decoder.head_dim**-0.5)
    chosen, _ = select(scores, modality, counts, cut.total)

    def gather() -> Any:
        kept = slots.gather(1, chosen)
        parts = [take(table, kept) for table in rotary]
        return take(hidden, chosen), parts, take_positions(slots[:1], kept), modality.gather(1, kept)

    parts = {
        "score": lambda: last_query_attention(query, key, None, None, decoder.head_dim**-0.5),
        "select": lambda: select(scores, modality, counts, cut.total),
        "gather": gather,
    }
    square = make(4096, 4096) if device.type == "cuda" else hidden  # 100 products take some 20 ms

    def seconds(part: Callable[[], Any]) -> float:
        ahead = partial(_repeat, partial(torch.matmul, square, square), 100)
        return timed(device, partial(_repeat, part, calls), ahead)[0] / calls

    times = {name: Spread.of([seconds(part) for _ in range(rounds + 1)][1:]) for name, part in parts.items()}
    return CutCost(tokens=n, layer=prefill / decoder.layers, **times)


@torch.inference_mode()
def stalls(workload: Workload, plan: Plan) -> list[Stall]:
    """One for each form of the prompt."""
    prompts: dict[str, Mapping[str, Any]] = {"embeddings": {"inputs_embeds": workload.embeds}}
    if workload.raw is not None:
        prompts["media"] = workload.raw
    if workload.device.type != "cuda":
        return [Stall(plan=plan.name, prompt=name, passed=None) for name in prompts]
    errors = {name: _wait(workload, plan, prompt) for name, prompt in prompts.items()}
    return [Stall(plan=plan.name, prompt=name, passed=not error, error=error) for name, error in errors.items()]


def _wait(workload: Workload, plan: Plan, prompt: Mapping[str, Any]) -> str | None:
    """What torch says of the first wait; None if there was none."""
    with workload.pruned(plan):
        workload.model(**prompt, logits_to_keep=1)  # what happens only once is not held against it
        torch.cuda.synchronize(workload.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            workload.model(**prompt, logits_to_keep=1)
        except RuntimeError as error:
            return str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return None


def context(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """How fast the machine multiplies and copies, to judge the rest by: TFLOP/s and GB/s (read plus written)."""
    side, numbers = (8192, 2**30) if device.type == "cuda" else (1024, 2**24)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(numbers, device=device, dtype=dtype)
    target = torch.empty_like(source)
    product = min(timed(device, lambda: torch.matmul(a, b))[0] for _ in range(10))
    copy = min(timed(device, lambda: target.copy_(source))[0] for _ in range(10))
    return {
        "matmul_tflops": 2 * side**3 / product / 1e12,
        "copy_gb_per_second": 2 * numbers * dtype.itemsize / copy / 1e9,
    }


def _repeat(work: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        work()
