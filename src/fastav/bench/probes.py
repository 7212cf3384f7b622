"""What explains the numbers: what cuts cost inside a prefill, waits for the device, and the encoders."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from transformers import PreTrainedModel

from fastav.bench.contenders import Contender
from fastav.bench.measure import Clock, Spread, forward, timed
from fastav.bench.workload import Workload, swapped
from fastav.engines.transformers.layer_inputs import LayerInputs
from fastav.errors import reason_of
from fastav.pruning import indexing
from fastav.pruning.state import PruningState

PARTS: Mapping[str, tuple[tuple[Any, str], ...]] = {  # what the engine calls for each part of a cut
    "score": ((PruningState, "cut"), (PruningState, "select_in_cache"), (PruningState, "observe")),
    "select": ((PruningState, "_select"),),
    "gather": ((indexing, "take"), (PruningState, "_keep"), (LayerInputs, "arguments"), (LayerInputs, "restored")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CutCost:
    """Seconds that all cuts of a plan take within one prefill, by part; merging counts as scoring."""

    score: Spread
    select: Spread
    gather: Spread

    def share(self, prefill: float) -> float:
        """Of a prefill of so many seconds."""
        return (self.score.median + self.select.median + self.gather.median) / prefill


@torch.inference_mode()
def cut_cost(workload: Workload, contender: Contender, rounds: int) -> CutCost:
    """Measured inside prefills of their own, whose first is not kept: marks in time cost a little time themselves."""
    found = []
    with workload.running(contender):
        for _ in range(rounds + 1):
            with _watched(Clock(workload.device)) as calls:
                forward(workload, ours=contender.ours)
            found.append(calls.seconds())
    return CutCost(**{part: Spread.of([seconds[part] for seconds in found[1:]]) for part in PARTS})


@dataclass(slots=True)
class _Calls:
    """Calls of what makes up a cut: part, start, end, and how many of the others they stand in."""

    clock: Clock
    spans: list[tuple[str, Any, Any, int]] = field(default_factory=list)
    depth: int = 0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls are noted."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start, self.depth = self.clock.now(), self.depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                self.spans.append((part, start, self.clock.now(), self.depth))

        return call

    def seconds(self) -> dict[str, float]:
        """By part, each call without those that stand in it."""
        total = dict.fromkeys(PARTS, 0.0)
        inner = [0.0] * 16  # seconds so far of calls at each depth, since the one around them began
        for part, start, end, depth in self.spans:  # inner calls end first
            seconds = self.clock.between(start, end)
            total[part] += seconds - inner[depth + 1]
            inner[depth] += seconds
            inner[depth + 1] = 0.0
        return total


@contextmanager
def _watched(clock: Clock) -> Iterator[_Calls]:
    """While active, what the engine calls to cut is timed."""
    calls = _Calls(clock)
    with ExitStack() as stack:
        for part, places in PARTS.items():
            for owner, name in places:
                stack.enter_context(swapped(owner, name, calls.timed(part, getattr(owner, name))))
        yield calls


@torch.inference_mode()
def encode(workload: Workload, rounds: int) -> Spread | None:
    """Seconds of the encoders and projectors; None where there is no raw media."""
    if workload.raw is None:
        return None
    embed = partial(_embedding(workload.model), **workload.raw)
    return Spread.of([timed(workload.device, embed)[0] for _ in range(rounds + 1)][1:])


def _embedding(model: PreTrainedModel) -> Callable[..., Any]:
    inner: Any = model.get_decoder()
    return inner.embed


@torch.inference_mode()
def wait(workload: Workload, contender: Contender) -> str | None:
    """What torch says of a prefill's first wait for the device; "" if it never waits, None where there is none."""
    if workload.device.type != "cuda":
        return None
    with workload.running(contender):
        forward(workload, ours=contender.ours)  # what happens only once is not held against it
        torch.cuda.synchronize(workload.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward(workload, ours=contender.ours)
        except RuntimeError as error:
            return reason_of(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return ""
