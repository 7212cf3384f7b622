"""Timing of a generation's phases and its peak memory, without stalling the device."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Stopwatch:
    """Measures time on the device: by CUDA events, read when all work is done, or by a clock of the host.

    host_clock: gives seconds; for devices other than CUDA.
    """

    def __init__(self, device: torch.device, host_clock: Callable[[], float] = time.perf_counter) -> None:
        self._cuda, self._device, self._host_clock = device.type == "cuda", device, host_clock

    def now(self) -> Any:
        """The current point in time, for `between`."""
        if not self._cuda:
            return self._host_clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one point in time to another."""
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Phases:
    """Measures the seconds of encode, prefill and decode of one generation.

    has_begun: whether the model or one of its encoders has been called.
    """

    def __init__(self, device: torch.device) -> None:
        self.has_begun = False
        self._watch = Stopwatch(device)
        self._forwards: list[tuple[Any, Any]] = []
        self._inside: list[tuple[Any, Any]] = []  # times of encoders within the forward
        self._before: list[tuple[Any, Any]] = []  # and before it, where `generate` runs them for some models
        self._running = False
        self._end: Any = None

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, after the generation."""
        inside, before = (
            sum((self._watch.between(*span) for span in spans), 0.0) for spans in (self._inside, self._before)
        )
        first = self._forwards[0]
        return {
            "encode": inside + before,
            "prefill": self._watch.between(*first) - inside,
            "decode": self._watch.between(first[1], self._end),
        }

    @contextmanager
    def timing(self, model: nn.Module, encoders: Sequence[nn.Module]) -> Iterator[None]:
        """Measure the model's calls while the context lasts."""
        with ExitStack() as stack:
            stack.enter_context(self._timing(model, self._forward))
            for encoder in encoders:
                stack.enter_context(self._timing(encoder, self._encoder))
            yield
            self._end = self._watch.now()

    def _forward(self, span: tuple[Any, Any]) -> None:
        self._forwards.append(span)
        self._running = False

    def _encoder(self, span: tuple[Any, Any]) -> None:
        (self._inside if self._running else self._before).append(span)

    @contextmanager
    def _timing(self, module: nn.Module, record: Callable[[tuple[Any, Any]], None]) -> Iterator[None]:
        starts: list[Any] = []

        def begin(*_: Any) -> None:
            self.has_begun = True
            self._running = self._running or record == self._forward
            starts.append(self._watch.now())

        before = module.register_forward_pre_hook(begin)
        after = module.register_forward_hook(lambda *_: record((starts.pop(), self._watch.now())))
        try:
            yield
        finally:
            before.remove()
            after.remove()


class PeakMemory:
    """Peak memory since `__init__`: allocated on CUDA devices, resident on a CPU under Linux, else unknown.

    If there are CUDA devices, only they count; their peaks, which may occur at different times, are added up.
    """

    _STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, *devices: torch.device) -> None:
        self._cuda = [device for device in devices if device.type == "cuda"]
        self._known = True
        for device in self._cuda:
            torch.cuda.reset_peak_memory_stats(device)
        if self._cuda:
            return
        try:
            self._CLEAR.write_text("5")  # resets the peak of the resident set
        except OSError:
            self._known = False

    def bytes(self) -> int | None:
        """The peak so far, in bytes; None if unknown."""
        if self._cuda:
            return sum(torch.cuda.max_memory_allocated(device) for device in self._cuda)
        if not self._known:
            return None
        line = next(line for line in self._STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
