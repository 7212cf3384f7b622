"""What explains the figures: the cost of cuts inside a prefill, waits for the device, and the encoders."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch

from fastav.bench.contenders import Contender
from fastav.bench.measure import Quartiles, forward, stopwatch, timed
from fastav.bench.workload import Workload
from fastav.engines.transformers.layer_inputs import LayerInputs
from fastav.engines.transformers.timing import Stopwatch
from fastav.errors import reason_of
from fastav.pruning import indexing
from fastav.pruning.state import PruningState

PARTS: Mapping[str, tuple[tuple[Any, str], ...]] = {  # the functions of the engine that make up a cut
    "score": ((PruningState, "cut"), (PruningState, "select_in_cache"), (PruningState, "observe")),
    "select": ((PruningState, "_select"),),
    "gather": ((indexing, "take"), (PruningState, "_keep"), (LayerInputs, "arguments"), (LayerInputs, "restore")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CutCost:
    """Seconds that all cuts of a plan take in one prefill, by part; merging counts as scoring."""

    score: Quartiles
    select: Quartiles
    gather: Quartiles

    def share(self, prefill: float) -> float:
        """The cost over that of a prefill, which is given in seconds."""
        return (self.score.median + self.select.median + self.gather.median) / prefill


@torch.inference_mode()
def cut_cost(workload: Workload, contender: Contender, rounds: int) -> CutCost:
    """The cost, in prefills apart because marks in time take a little time; the first prefill is a warm-up."""
    costs = []
    with workload.running(contender):
        for _ in range(rounds + 1):
            with _timed_calls(stopwatch(workload.device)) as calls:
                forward(workload, ours=contender.ours)
            costs.append(calls.seconds())
    return CutCost(**{part: Quartiles.of([seconds[part] for seconds in costs[1:]]) for part in PARTS})


@dataclass(slots=True)
class _Calls:
    """Calls of the functions that make up a cut.  spans: part, start, end, and how deep a call is nested in others."""

    watch: Stopwatch
    spans: list[tuple[str, Any, Any, int]] = field(default_factory=list)
    depth: int = 0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its calls recorded."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start, self.depth = self.watch.now(), self.depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                self.spans.append((part, start, self.watch.now(), self.depth))

        return call

    def seconds(self) -> dict[str, float]:
        """Seconds by part; each call counts without the calls inside it."""
        total = dict.fromkeys(PARTS, 0.0)
        inner = [0.0] * 16  # by depth: seconds of calls so far, since the call around them began
        for part, start, end, depth in self.spans:  # inner calls end first
            seconds = self.watch.between(start, end)
            total[part] += seconds - inner[depth + 1]
            inner[depth] += seconds
            inner[depth + 1] = 0.0
        return total


@contextmanager
def _timed_calls(watch: Stopwatch) -> Iterator[_Calls]:
    """While active, the functions of `PARTS` are timed."""
    calls = _Calls(watch)
    with ExitStack() as stack:
        for part, places in PARTS.items():
            for owner, name in places:
                function = getattr(owner, name)
                setattr(owner, name, calls.timed(part, function))
                stack.callback(setattr, owner, name, function)
        yield calls


@torch.inference_mode()
def encoder_cost(workload: Workload, rounds: int) -> Quartiles | None:
    """Seconds of the encoders and projectors; None if the workload has no raw media."""
    if workload.raw is None:
        return None
    inner: Any = workload.model.get_decoder()
    embed = partial(inner.embed, **workload.raw)
    return Quartiles.of([timed(workload.device, embed)[0] for _ in range(rounds + 1)][1:])


@torch.inference_mode()
def first_wait(workload: Workload, contender: Contender) -> str | None:
    """torch's message about a prefill's first wait for the device; "" if it never waits, None on a CPU."""
    if workload.device.type != "cuda":
        return None
    with workload.running(contender):
        forward(workload, ours=contender.ours)  # what waits only the first time does not count
        torch.cuda.synchronize(workload.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward(workload, ours=contender.ours)
        except RuntimeError as error:
            return reason_of(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return ""
