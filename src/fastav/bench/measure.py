"""How it is measured: all contenders in turn, round after round, and ratios within a round."""

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
from fastav.bench.workload import Workload, lacks_memory, release
from fastav.engines.transformers.generation.loop import last_alone
from fastav.errors import FastAVError

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


class Clock:
    """Marks in time: CPU time of the process, or CUDA events, read once the work is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Any:
        """A mark."""
        if self._device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another."""
        if self._device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def still(self) -> None:
        """Wait until the device has nothing to do."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of some work: CPU time of the process, or GPU time between two events."""
    clock = Clock(device)
    clock.still()
    start = clock.now()
    result = work()
    end = clock.now()
    return clock.between(start, end), result


class Peak:
    """Most memory allocated from here on, above what is there now."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, allocated(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        """So far; None on a CPU, where the heap keeps what was freed and nothing tells."""
        return torch.cuda.max_memory_allocated(self._device) - self._before if self._device.type == "cuda" else None


def allocated(device: torch.device) -> int:
    """Bytes on a CUDA device; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds(Generic[T]):
    """Results by contender: of the first round, which is not kept, of the others, and why some have none."""

    first: Mapping[str, T]
    kept: Mapping[str, Sequence[T]]
    failed: Mapping[str, str]


def interleaved(contenders: Sequence[Contender], rounds: int, work: Callable[[Contender], T]) -> Rounds[T]:
    """What `work` gives for every contender in every round; each round starts with another contender.

    A contender that runs out of memory, or that the engine refuses, is out; the others go on.
    """
    first: dict[str, T] = {}
    kept: dict[str, list[T]] = {one.name: [] for one in contenders}
    failed: dict[str, str] = {}
    for number in range(rounds + 1):
        turn = number % len(contenders)
        for one in (*contenders[turn:], *contenders[:turn]):
            if one.name in failed:
                continue
            try:
                result = work(one)
            except Exception as error:
                failed[one.name] = _reason(error)
                result = None
            if result is None:
                release()  # only now does nothing refer to what did not fit
            elif number:
                kept[one.name].append(result)
            else:
                first[one.name] = result
    whole = {name: results for name, results in kept.items() if name not in failed}
    return Rounds(first=first, kept=whole, failed=failed)


def _reason(error: Exception) -> str:
    """In a line.  Raises: the error itself, if it is neither a lack of memory nor a refusal."""
    if isinstance(error, FastAVError):
        return str(error)
    if not lacks_memory(error):
        raise error
    return "out of memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One forward over a prompt.

    wall: what a watch on the wall shows, compilation included. peak_bytes: above what was there before; kv_bytes: what
    the cache really holds.
    """

    seconds: float
    wall: float
    peak_bytes: int | None
    kv_bytes: int


@torch.inference_mode()
def prefill(workload: Workload, contender: Contender) -> Prefill:
    """One forward over the prompt."""
    gc.collect()
    with workload.running(contender):
        peak, start = Peak(workload.device), time.perf_counter()
        seconds, output = timed(workload.device, partial(forward, workload, ours=contender.ours))
        wall = time.perf_counter() - start
    return Prefill(seconds=seconds, wall=wall, peak_bytes=peak.bytes(), kv_bytes=held(cache_argument.of_output(output)))


def forward(workload: Workload, *, ours: bool) -> Any:
    """A prefill, as `generate` asks for it, or our decoding."""
    with last_alone(workload.model) if ours and not workload.last_logits else nullcontext():
        return workload.model(**workload.inputs, use_cache=True, **workload.last_logits)


def held(cache: Any) -> int:
    """Bytes of memory behind the keys and values of a cache."""
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(part.untyped_storage().nbytes() for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer, from the raw media if there are any, else from embeddings.

    seconds: of everything. decode: of each token after the first; None for an answer of one token. wall: what a watch
    on the wall shows, captures included. kept_bytes: memory that is in use afterwards and was not before.
    """

    seconds: float
    decode: float | None
    wall: float
    peak_bytes: int | None
    kept_bytes: int


@dataclass(slots=True)
class _Marks(LogitsProcessor):
    """Marks when every token is chosen, the first of which ends the prefill."""

    clock: Clock
    marks: list[Any] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.marks.append(self.clock.now())
        return scores


@torch.inference_mode()
def answer(workload: Workload, contender: Contender, new_tokens: int) -> Answer:
    """So many tokens, greedily."""
    gc.collect()
    device, model, clock = workload.device, workload.model, Clock(workload.device)
    marks = _Marks(clock)
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
    options |= {"logits_processor": LogitsProcessorList([marks])}
    if contender.ours:
        options["custom_generate"] = workload.decoding
    before = allocated(device)
    with workload.running(contender):
        peak, start = Peak(device), time.perf_counter()
        generate: Any = model.generate
        seconds, ids = timed(device, partial(generate, **(workload.raw or workload.inputs), **options))
        clock.still()
        wall = time.perf_counter() - start
    del ids
    decode = clock.between(marks.marks[0], marks.marks[-1]) / (new_tokens - 1) if new_tokens > 1 else None
    return Answer(
        seconds=seconds,
        decode=decode,
        wall=wall,
        peak_bytes=peak.bytes(),
        kept_bytes=allocated(device) - before,
    )
