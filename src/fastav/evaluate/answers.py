"""Answering samples, in this process or in several."""

import signal
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from fastav import __version__
from fastav.decoding.settings import greedy_settings
from fastav.engine import Answer
from fastav.errors import FastAVError, reason_of
from fastav.evaluate.divergence import Divergence
from fastav.pipelines import Pipeline, pipeline
from fastav.plan import Plan
from fastav.provenance import provenance
from fastav.task import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every process loads, and the plans by the names that rows carry.

    kl: whether the divergence from the unpruned model is measured, which is one of the plans.
    """

    model: str
    device: str
    dtype: str
    plans: Mapping[str, Plan]
    kl: bool = False

    @property
    def reference(self) -> str | None:
        """The name of the plan that prunes nothing, if there is one."""
        return next((name for name, plan in self.plans.items() if not plan.steps), None)

    def load(self) -> Pipeline:
        """The pipeline with the first plan.  Raises: as `fastav.pipeline`."""
        plan = next(iter(self.plans.values()))
        return pipeline(self.model, plan, device=self.device, dtype=self.dtype)

    def head(self) -> dict[str, Any]:
        """The setting of a run, for the line that precedes its rows: model, plans, and where it was measured."""
        environment = provenance(torch.device(self.device))
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "plans": {
                name: {"fingerprint": plan.fingerprint, "steps": [step.to_dict() for step in plan.steps]}
                for name, plan in self.plans.items()
            },
            **environment,
            "versions": {"fastav": __version__, **environment["versions"]},
        }


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer, and its divergence from the unpruned model if that is measured."""

    answer: Answer
    kl: Divergence | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason why there is no answer."""

    reason: str


Work = tuple[Sample, tuple[str, ...]]  # a sample, and the names of the plans to answer it under
Outcome = tuple[Sample, str, Answered | Failure]  # a sample, the name of a plan, and the result


def answers(setup: Setup, work: Sequence[Work], jobs: int) -> Iterator[Outcome]:
    """Answer every sample under its plans; with several processes, in any order. Each process loads the model.

    Raises: as `Setup.load`; FastAVError if a process is killed.
    """
    if not work:
        return
    if jobs == 1 or len(work) == 1:
        pipe = setup.load()
        for sample, plans in work:
            for plan, outcome in _answer_sample(pipe, setup, sample, plans):
                yield sample, plan, outcome
    else:
        yield from _answer_in_processes(setup, work, min(jobs, len(work)))


def _answer_sample(
    pipe: Pipeline, setup: Setup, sample: Sample, names: Sequence[str]
) -> Iterator[tuple[str, Answered | Failure]]:
    """The model's answer under each plan; for divergences the unpruned one is first. Any exception is a failure."""
    request: Any = None
    unpruned: tuple[Answer, Tensor] | None = None
    for name in names:
        try:
            request, plan = request or sample.request(), setup.plans[name]
            settings = {**greedy_settings(), "max_new_tokens": sample.max_new_tokens}
            (answer,) = pipe.engine.generate([request], plan, **settings)
            outcome = Answered(answer)
            if setup.kl and name == setup.reference:
                unpruned = answer, pipe.engine.forced_logits([request], plan, [answer.token_ids])[0]
            elif setup.kl and unpruned is not None:
                base, logits = unpruned
                (pruned,) = pipe.engine.forced_logits([request], plan, [base.token_ids])
                outcome = Answered(answer, Divergence.of(base, logits, pruned))
        except Exception as error:  # the caller decides whether to continue
            message = str(error) if isinstance(error, FastAVError) else reason_of(error, with_type=True)
            outcome = Failure(" ".join(message.split()))
        yield name, outcome


def _answer_in_processes(setup: Setup, work: Sequence[Work], jobs: int) -> Iterator[Outcome]:
    """Send a sample to every idle process until all samples are answered."""
    queue, current, processes, warned = iter(work), {}, {}, set()
    threads = max(1, torch.get_num_threads() // jobs)
    context = get_context("spawn")
    try:
        for _ in range(jobs):
            parent_end, child_end = context.Pipe()
            process = context.Process(target=_serve, args=(child_end, setup, threads), daemon=True)
            with _block_interrupts():
                process.start()
            child_end.close()
            processes[parent_end], current[parent_end] = process, None
        while current:
            for connection in wait(list(current)):
                assert isinstance(connection, Connection)
                with _check_alive(processes[connection]):
                    message = connection.recv()
                if isinstance(message, FastAVError):
                    raise message
                if isinstance(message, Warning):
                    if str(message) not in warned:
                        warned.add(str(message))
                        warnings.warn(message, stacklevel=2)
                elif message is not None:
                    yield current[connection], *message
                elif (item := next(queue, None)) is not None:
                    current[connection] = item[0]
                    with _check_alive(processes[connection]):
                        connection.send(item)
                else:
                    del current[connection]
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


@contextmanager
def _check_alive(process: Any) -> Iterator[None]:
    """Turn the errors of a dead process into a FastAVError with its exit code."""
    try:
        yield
    except (EOFError, OSError):
        process.join()
        raise FastAVError(
            f"a process ended with exit code {process.exitcode}", "out of memory? try fewer --jobs"
        ) from None


def _serve(connection: Connection, setup: Setup, threads: int) -> None:
    """Load the model and answer samples, in a process of its own.

    It sends None when it is idle, one answer at a time, warnings of fastav, and the error if the model cannot be
    loaded.
    """
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    with suppress(EOFError, OSError):  # the parent process is gone
        try:
            pipe = setup.load()
        except FastAVError as error:
            connection.send(error)
            return
        pending = _collect_warnings()
        while True:
            connection.send(None)
            sample, names = connection.recv()
            for outcome in _answer_sample(pipe, setup, sample, names):
                while pending:
                    connection.send(pending.popleft())
                connection.send(outcome)
            while pending:
                connection.send(pending.popleft())


def _collect_warnings() -> deque[Warning | str]:
    """A queue that collects fastav's warnings from now on; those of other libraries are ignored."""
    pending: deque[Warning | str] = deque()  # any thread may warn, but only one may send

    def collect(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category.__module__.startswith("fastav."):
            pending.append(message)

    warnings.simplefilter("default", UserWarning)
    warnings.showwarning = collect
    return pending


@contextmanager
def _block_interrupts() -> Iterator[None]:
    """Block Ctrl-C for processes that start inside, since a terminal sends it to all; the parent ends them.

    The parent gets a Ctrl-C that came meanwhile when this context ends. On Windows this does nothing.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # otherwise the first process starts it, which removes the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
