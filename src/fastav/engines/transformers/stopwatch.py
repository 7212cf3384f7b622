"""Where the time of a generation goes, and its peak memory, without stalling the device."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Stopwatch:
    """Marks points in time on the device: CUDA events, read once everything is done, or the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        """A mark."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another."""
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Phases:
    """Seconds of encode, prefill and decode of one generation."""

    def __init__(self, device: torch.device) -> None:
        self._watch = Stopwatch(device)
        self._forwards: list[tuple[Any, Any]] = []
        self._encoders: list[tuple[Any, Any]] = []
        self._end: Any = None

    def seconds(self) -> dict[str, float]:
        """After the generation: by phase."""
        encode = sum(self._watch.between(*span) for span in self._encoders)
        first = self._forwards[0]
        prefill = self._watch.between(*first) - encode
        return {"encode": encode, "prefill": prefill, "decode": self._watch.between(first[1], self._end)}

    @contextmanager
    def timing(self, model: nn.Module, encoders: Sequence[nn.Module]) -> Iterator[None]:
        """Time everything that `model` does inside."""
        with ExitStack() as stack:
            for module, spans in [(model, self._forwards), *((encoder, self._encoders) for encoder in encoders)]:
                stack.enter_context(self._timing(module, spans))
            yield
            self._end = self._watch.now()

    @contextmanager
    def _timing(self, module: nn.Module, spans: list[tuple[Any, Any]]) -> Iterator[None]:
        started = []
        before = module.register_forward_pre_hook(lambda *_: started.append(self._watch.now()))
        after = module.register_forward_hook(lambda *_: spans.append((started.pop(), self._watch.now())))
        try:
            yield
        finally:
            before.remove()
            after.remove()


class PeakMemory:
    """Most memory in use since `__init__`: allocated on a CUDA device, resident on a CPU under Linux, else unknown."""

    _STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            self._CLEAR.write_text("5")  # resets the peak of the resident set
        except OSError:
            self._known = False

    def bytes(self) -> int | None:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._known:
            return None
        line = next(line for line in self._STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
