"""How it is measured: all plans in turn, round after round, and ratios within a round."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch

from fastav.bench.workload import ADAPTER, Workload
from fastav.flops import kv_bytes, prefill_flops
from fastav.plan import Plan

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of these values."""
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median=median, low=low, high=high)

    @classmethod
    def of_ratios(cls, values: Sequence[float], over: Sequence[float]) -> "Spread":
        """Of the ratios of values measured in the same round."""
        return cls.of([value / base for value, base in zip(values, over, strict=True)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run of one plan cost.

    seconds: CPU time of the process, or time on the GPU between CUDA events. peak_bytes: most memory allocated above
    the weights; None on a CPU. kv_bytes: what the cache really holds.
    """

    seconds: float
    peak_bytes: int | None
    kv_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan.  Times in seconds, of the whole batch; ratios are over the unpruned run.

    flops_ratio: of the prefill, attention counted causally, as the kernels compute it.
    decode: per new token. end_to_end: encoders (if the shape has any), prefill and `new_tokens` tokens.
    prefill_peak_bytes, peak_bytes: above the weights; of the prefill, and end to end.
    """

    plan: str
    new_tokens: int
    tokens_per_layer: tuple[int, ...]
    flops: int
    flops_ratio: float
    prefill: Spread
    prefill_ratio: Spread
    kv_bytes: int
    kv_bytes_expected: int
    prefill_peak_bytes: int | None
    decode: Spread | None = None
    decode_ratio: Spread | None = None
    end_to_end: Spread | None = None
    end_to_end_ratio: Spread | None = None
    peak_bytes: int | None = None

    @property
    def gap(self) -> float:
        """How much more (or less) of its time than of its FLOPs the prefill kept."""
        return self.prefill_ratio.median / self.flops_ratio - 1


def timed(device: torch.device, work: Callable[[], T], warm: Callable[[], Any] | None = None) -> tuple[float, T]:
    """Seconds of some work: CPU time of the process, or GPU time between two events.

    warm: keeps a GPU busy beforehand, so that the work is queued up by the time it starts and launches cost nothing.
    """
    if device.type != "cuda":
        start = time.process_time()
        result = work()
        return time.process_time() - start, result
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if warm is not None:
        warm()
    first.record()
    result = work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000, result


def interleaved(plans: Sequence[Plan], rounds: int, work: Callable[[Plan], T]) -> dict[str, list[T]]:
    """The results of `work`, by plan and round; each round starts with another plan, and the first one is not kept."""
    results: dict[str, list[T]] = {plan.name: [] for plan in plans}
    for number in range(rounds + 1):
        turn = number % len(plans)
        for plan in (*plans[turn:], *plans[:turn]):
            result = work(plan)
            if number:
                results[plan.name].append(result)
    return results


@torch.inference_mode()
def prefill(workload: Workload, plan: Plan) -> Run:
    """One forward over the embedded prompt, with the logits of the last token."""
    peak = _Peak(workload)
    with workload.pruned(plan):
        seconds, output = timed(workload.device, partial(_forward, workload))
    return Run(seconds=seconds, peak_bytes=peak.bytes(), kv_bytes=_held(output.past_key_values))


@torch.inference_mode()
def decode(workload: Workload, plan: Plan, new_tokens: int) -> float:
    """Seconds per new token after a prefill."""

    def steps() -> None:
        now = output
        for _ in range(new_tokens):
            token = now.logits[:, -1:].argmax(-1)
            now = workload.model(input_ids=token, past_key_values=now.past_key_values, logits_to_keep=1)

    with workload.pruned(plan):
        output = _forward(workload)
        return timed(workload.device, steps)[0] / new_tokens


@torch.inference_mode()
def end_to_end(workload: Workload, plan: Plan, new_tokens: int) -> Run:
    """`generate`, from the raw media where the shape has encoders."""
    peak, model = _Peak(workload), cast(Any, workload.model)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True}
    with workload.pruned(plan):
        seconds, output = timed(workload.device, partial(model.generate, **workload.prompt, **options))
    return Run(seconds=seconds, peak_bytes=peak.bytes(), kv_bytes=_held(output.past_key_values))


def measure(workload: Workload, plans: Sequence[Plan], rounds: int, answer_rounds: int, new_tokens: int) -> list[Row]:
    """All plans, the first being the unpruned one.

    rounds: of prefills; answer_rounds: of decoding and end to end. new_tokens: 0 to leave those two out.
    """
    prefills = interleaved(plans, rounds, partial(prefill, workload))
    decodes: dict[str, list[float]] = {}
    answers: dict[str, list[Run]] = {}
    if new_tokens:
        decodes = interleaved(plans, answer_rounds, partial(decode, workload, new_tokens=new_tokens))
        answers = interleaved(plans, answer_rounds, partial(end_to_end, workload, new_tokens=new_tokens))
    base = plans[0].name
    return [
        Row(
            plan=plan.name,
            new_tokens=new_tokens,
            **_of_tokens(workload, plans[0], plan),
            **_of_prefills(prefills[plan.name], prefills[base]),
            **(_of_answers(answers[plan.name], answers[base]) if new_tokens else {}),
            **(_of_decodes(decodes[plan.name], decodes[base]) if new_tokens else {}),
        )
        for plan in plans
    ]


def _of_tokens(workload: Workload, base: Plan, plan: Plan) -> dict[str, Any]:
    decoder = ADAPTER.shape(workload.model.config)
    full, tokens = (p.tokens(workload.layout, decoder.layers) for p in (base, plan))
    flops, held = prefill_flops(decoder, tokens), plan.cached(workload.layout, decoder.layers)
    return {
        "tokens_per_layer": tokens,
        "flops": workload.batch * flops,
        "flops_ratio": flops / prefill_flops(decoder, full),
        "kv_bytes_expected": workload.batch * kv_bytes(decoder, held, workload.model.dtype.itemsize),
    }


def _of_prefills(runs: Sequence[Run], base: Sequence[Run]) -> dict[str, Any]:
    seconds = [run.seconds for run in runs]
    return {
        "prefill": Spread.of(seconds),
        "prefill_ratio": Spread.of_ratios(seconds, [run.seconds for run in base]),
        "prefill_peak_bytes": runs[-1].peak_bytes,
        "kv_bytes": runs[-1].kv_bytes,
    }


def _of_decodes(seconds: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    return {"decode": Spread.of(seconds), "decode_ratio": Spread.of_ratios(seconds, base)}


def _of_answers(runs: Sequence[Run], base: Sequence[Run]) -> dict[str, Any]:
    seconds = [run.seconds for run in runs]
    return {
        "end_to_end": Spread.of(seconds),
        "end_to_end_ratio": Spread.of_ratios(seconds, [run.seconds for run in base]),
        "peak_bytes": runs[-1].peak_bytes,
    }


class _Peak:
    """Most memory allocated above the weights from here on; None on a CPU."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        if workload.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(workload.device)

    def bytes(self) -> int | None:
        if self._workload.device.type != "cuda":
            return None
        tensors = (*self._workload.model.parameters(), *self._workload.model.buffers())
        weights = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return torch.cuda.max_memory_allocated(self._workload.device) - weights


def _forward(workload: Workload) -> Any:
    return workload.model(inputs_embeds=workload.embeds, use_cache=True, logits_to_keep=1)


def _held(cache: Any) -> int:
    return sum(part.untyped_storage().nbytes() for layer in cache.layers for part in (layer.keys, layer.values))
