"""How contenders are measured: in turn, round after round, with ratios taken within a round."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from fastav import cache_argument
from fastav.bench.contenders import Contender
from fastav.bench.workload import Workload, is_out_of_memory, release_memory
from fastav.engines.transformers.generation.loop import last_logits_only
from fastav.engines.transformers.timing import PeakMemory, Stopwatch
from fastav.errors import FastAVError

T = TypeVar("T")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quartiles:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Those of values."""
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median=median, low=low, high=high)

    @classmethod
    def of_ratios(cls, values: Sequence[float], over: Sequence[float]) -> "Quartiles":
        """Those of the ratios of values measured in the same round."""
        return cls.of([value / base for value, base in zip(values, over, strict=True)])


def stopwatch(device: torch.device) -> Stopwatch:
    """A stopwatch of CUDA events, or of the process's CPU time."""
    return Stopwatch(device, time.process_time)


def timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that some work takes, and its result: GPU time between two events, or CPU time of the process."""
    watch = stopwatch(device)
    synchronize(device)
    start = watch.now()
    result = work()
    end = watch.now()
    return watch.between(start, end), result


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakGrowth:
    """Most memory in use since `__init__`, above what was in use then: allocated on CUDA, else the resident set."""

    def __init__(self, device: torch.device) -> None:
        self._start = _allocated(device) if device.type == "cuda" else PeakMemory(device).bytes()
        self._peak = PeakMemory(device)

    def bytes(self) -> int | None:
        """The growth so far; None if the system does not report it."""
        peak = self._peak.bytes()
        return None if peak is None or self._start is None else peak - self._start


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds(Generic[T]):
    """Results by contender.

    warmup: of the first round, which does not count. results: of the others. failed: the reasons of contenders that
    have no results.
    """

    warmup: Mapping[str, T]
    results: Mapping[str, Sequence[T]]
    failed: Mapping[str, str]


def rotated(items: Sequence[T], number: int) -> list[T]:
    """The items in the order of this round: each round starts with another one."""
    first = number % len(items)
    return [*items[first:], *items[:first]]


def interleaved(contenders: Sequence[Contender], rounds: int, work: Callable[[Contender], T]) -> Rounds[T]:
    """The results of `work` for every contender in every round.

    A contender that runs out of memory, or that the engine refuses, drops out; the others go on.
    """
    warmup: dict[str, T] = {}
    results: dict[str, list[T]] = {one.name: [] for one in contenders}
    failed: dict[str, str] = {}
    for number in range(rounds + 1):
        for one in rotated(contenders, number):
            if one.name in failed:
                continue
            try:
                result = work(one)
            except Exception as error:
                failed[one.name] = _reason(error)
                result = None
            if result is None:
                release_memory()  # after the handler, where nothing refers to what did not fit
            elif number:
                results[one.name].append(result)
            else:
                warmup[one.name] = result
    return Rounds(
        warmup=warmup, results={name: of for name, of in results.items() if name not in failed}, failed=failed
    )


def _reason(error: Exception) -> str:
    """One line.  Raises: the error itself, unless it is a refusal or a lack of memory."""
    if isinstance(error, FastAVError):
        return str(error)
    if not is_out_of_memory(error):
        raise error
    return OUT_OF_MEMORY


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRun:
    """One forward over a prompt.

    seconds: CPU or GPU time. wall: elapsed time, compilation included. peak_bytes: memory above what was in use before;
    None on a CPU, whose allocator keeps freed memory. kv_bytes: memory of the cache.
    """

    seconds: float
    wall: float
    peak_bytes: int | None
    kv_bytes: int


@torch.inference_mode()
def run_prefill(workload: Workload, contender: Contender) -> PrefillRun:
    """Run one forward over the prompt."""
    gc.collect()
    with workload.running(contender):
        peak, start = _cuda_peak(workload.device), time.perf_counter()
        seconds, output = timed(workload.device, partial(forward, workload, ours=contender.ours))
        wall = time.perf_counter() - start
    kv_bytes = cache_bytes(cache_argument.of_output(output))
    return PrefillRun(seconds=seconds, wall=wall, peak_bytes=peak and peak.bytes(), kv_bytes=kv_bytes)


def forward(workload: Workload, *, ours: bool) -> Any:
    """A prefill, called as `generate` calls it, or as our decoding loop does."""
    with last_logits_only(workload.model) if ours and not workload.last_logits else nullcontext():
        return workload.model(**workload.inputs, use_cache=True, **workload.last_logits)


def cache_bytes(cache: Any) -> int:
    """Bytes of memory behind the keys and values of a cache."""
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(part.untyped_storage().nbytes() for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRun:
    """One answer, from raw media if the workload has any, else from embeddings.

    seconds: CPU or GPU time of everything. decode: seconds of each token after the first; None for an answer of one
    token. wall: elapsed time, captures included. peak_bytes: as of `PrefillRun`. retained_bytes: memory that is in use
    afterwards and was not before; 0 on a CPU.
    """

    seconds: float
    decode: float | None
    wall: float
    peak_bytes: int | None
    retained_bytes: int


@dataclass(slots=True)
class _TokenMarks(LogitsProcessor):
    """A mark in time whenever a token is chosen; the first one ends the prefill."""

    watch: Stopwatch
    marks: list[Any] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.marks.append(self.watch.now())
        return scores


@torch.inference_mode()
def run_answer(workload: Workload, contender: Contender, new_tokens: int) -> AnswerRun:
    """Generate this many tokens, greedily."""
    gc.collect()
    device, watch = workload.device, stopwatch(workload.device)
    tokens = _TokenMarks(watch)
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
    options |= {"logits_processor": LogitsProcessorList([tokens])}
    if contender.ours:
        options["custom_generate"] = workload.decoding
    before = _allocated(device)
    with workload.running(contender):
        peak, start = _cuda_peak(device), time.perf_counter()
        generate: Any = workload.model.generate
        seconds = timed(device, partial(generate, **(workload.raw or workload.inputs), **options))[0]
        synchronize(device)
        wall = time.perf_counter() - start
    decode = watch.between(tokens.marks[0], tokens.marks[-1]) / (new_tokens - 1) if new_tokens > 1 else None
    return AnswerRun(
        seconds=seconds,
        decode=decode,
        wall=wall,
        peak_bytes=peak and peak.bytes(),
        retained_bytes=_allocated(device) - before,
    )


def _cuda_peak(device: torch.device) -> PeakGrowth | None:
    return PeakGrowth(device) if device.type == "cuda" else None


def _allocated(device: torch.device) -> int:
    """Bytes on a CUDA device; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
