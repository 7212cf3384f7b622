"""One model, many clients: jobs wait in a bounded queue, and are answered in batches of like shape.

Two threads work. One chooses and prepares batches: the jobs that wait while a batch runs are the next one. The other
runs the model. The event loop hears of text and answers by callbacks.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

from fastav.adapter import Prepared
from fastav.batches import attempt
from fastav.engine import Answer, Engine, Listener, Run
from fastav.errors import EngineStopped, FastAVError
from fastav.plan import Plan
from fastav.request import Request
from fastav.request_lock import Cancellation, Cancelled

THREADS = "fastav-serve"  # the start of the names of threads


class QueueFull(FastAVError):
    """The queue has no room.  retry_after: seconds after which it may have."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"the queue is full: {waiting} requests wait", "try again later")
        self.retry_after = retry_after


class Stopping(FastAVError):
    """The server is shutting down."""


@dataclass(eq=False, kw_only=True)
class Job:
    """One answer that a client waits for.  It belongs to the event loop that made it.

    request, prepared: what to answer; prepared for the request alone. plan, settings: as for `Engine.generate`.
    is_alone: whether it must not be batched with others, because its tokens would depend on them.
    media_seconds: what it took to prepare it.
    on_text: called in the event loop with each piece of the answer; None if it does not stream.
    answer: resolves to the answer, with the seconds in the queue, or raises FastAVError or Cancelled.
    """

    request: Request
    prepared: Prepared
    plan: Plan
    settings: Mapping[str, Any]
    is_alone: bool = False
    media_seconds: float = 0.0
    on_text: Callable[[str], None] | None = None
    cancellation: Cancellation = field(default_factory=Cancellation)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    answer: "asyncio.Future[Answer]" = field(init=False)
    arrived: float = field(default_factory=time.monotonic)
    has_text: bool = False  # whether the client has got a piece

    def __post_init__(self) -> None:
        self.answer = self.loop.create_future()
        self.answer.add_done_callback(_mark_read)

    @property
    def shape(self) -> Hashable:
        """What the jobs of a batch share: plan, settings, tracks, and the size of the prompt to a factor of 2."""
        if self.is_alone:
            return id(self)
        settings = tuple(sorted((name, repr(value)) for name, value in self.settings.items()))
        return (
            self.plan.name,
            self.plan.fingerprint,
            settings,
            self.request.tracks,
            len(self.prepared.layouts[0]).bit_length(),
        )

    def listener(self) -> Listener:
        """What the engine tells the job."""
        return Listener(on_text=None if self.on_text is None else self._pass_on, cancellation=self.cancellation)

    def _pass_on(self, piece: str) -> None:
        self.has_text = True
        assert self.on_text is not None
        self._call(self.on_text, piece)

    def finish(self, outcome: Answer | BaseException) -> None:
        """Give the client its answer or error, unless it has left."""
        self._call(self._finish, outcome)

    def _finish(self, outcome: Answer | BaseException) -> None:
        if self.answer.done():
            return
        if isinstance(outcome, BaseException):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the loop is closed, and nobody waits
            self.cancellation.cancel()


def _mark_read(answer: "asyncio.Future[Answer]") -> None:
    """Read an error that may have no reader any more, so that asyncio does not report it."""
    if not answer.cancelled():
        answer.exception()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """What a batch took.  size: answers. seconds: from its turn to its end."""

    size: int
    seconds: float


class Scheduler:
    """Answers jobs in batches.

    engine: streams the answers of a batch. batch: jobs that run together at most. wait: seconds that a job waits for
    others at most when the model is free, if others are known to come. capacity: answers that are admitted at the same
    time. on_batch: called after each batch, in the model's thread.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch: int = 8,
        wait: float | int = 0.01,
        capacity: int = 64,
        on_batch: Callable[[BatchReport], None] = lambda report: None,
    ) -> None:
        self._engine, self._batch, self._wait, self._capacity = engine, batch, wait, capacity
        self._on_batch = on_batch
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._admitted, self._expected = 0, 0  # answers in the house; of these, those whose media are being decoded
        self._is_running, self._stopped = False, False
        self._seconds_per_answer = 1.0  # an average over the last batches
        self._failure: FastAVError | None = None  # after which nothing can be answered
        self._ready: SimpleQueue[tuple[list[Job], Run] | None] = SimpleQueue()
        self._taken = threading.Semaphore(1)  # one batch is prepared ahead
        self._threads = [
            threading.Thread(target=work, name=f"{THREADS}-{name}", daemon=True)
            for name, work in (("prepare", self._prepare_batches), ("run", self._run_batches))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def admitted(self) -> int:
        """Answers that clients wait for."""
        return self._admitted

    @property
    def waiting(self) -> int:
        """Jobs that wait for the model."""
        return len(self._jobs)

    @property
    def failure(self) -> FastAVError | None:
        """Why no request can be answered any more; None if all is well."""
        return self._failure

    @contextmanager
    def admission(self, answers: int = 1) -> Generator[None]:
        """Hold a place in the queue for so many answers, from before their media are decoded to their end.

        Raises: QueueFull; Stopping; EngineStopped if nothing can be answered any more.
        """
        if self._failure is not None:
            raise EngineStopped(f"the model cannot answer any more: {self._failure.message}", "start the server again")
        if self._stopped:
            raise Stopping("the server is shutting down", "try another one")
        if self._admitted + answers > self._capacity:
            raise QueueFull(self._admitted, max(1, math.ceil(self._admitted * self._seconds_per_answer)))
        self._admitted += answers
        try:
            yield
        finally:
            self._admitted -= answers

    @contextmanager
    def expecting(self) -> Generator[None]:
        """Tell that a job will be submitted soon, for which others may wait."""
        with self._changed:
            self._expected += 1
        try:
            yield
        finally:
            with self._changed:
                self._expected -= 1
                self._changed.notify_all()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for their turn."""
        with self._changed:
            self._jobs.extend(jobs)
            self._changed.notify_all()

    def close(self) -> None:
        """Finish the batches that run, fail the jobs that wait, and end the threads."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    # --- choosing and preparing batches

    def _prepare_batches(self) -> None:
        while (jobs := self._next_batch()) is not None:
            self._prepare(jobs)
        self._ready.put(None)

    def _next_batch(self) -> list[Job] | None:
        """The jobs of the next batch; None at the end.  Waits until it is full or the model is free."""
        self._taken.acquire()
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._stopped:
                    for job in self._jobs:
                        job.finish(Stopping("the server is shutting down", "try another one"))
                    self._jobs.clear()
                    return None
                jobs = self._like_the_first()
                if jobs and (len(jobs) == self._batch or jobs[0].is_alone):
                    break
                left = None
                if jobs and not self._is_running:
                    left = jobs[0].arrived + self._wait - time.monotonic() if self._expected else 0.0
                    if left <= 0:
                        break
                self._changed.wait(left)
            for job in jobs:
                self._jobs.remove(job)
        return jobs

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._jobs if job.cancellation.is_cancelled]:
            self._jobs.remove(job)
            job.finish(Cancelled())

    def _like_the_first(self) -> list[Job]:
        """The jobs that fit the one that has waited longest, in order of arrival."""
        if not self._jobs:
            return []
        shape = self._jobs[0].shape
        return [job for job in self._jobs if job.shape == shape][: self._batch]

    def _prepare(self, jobs: list[Job]) -> None:
        prepare = self._attempt(partial(self._engine.preparer, jobs[0].plan, **jobs[0].settings), jobs)
        if prepare is None:
            self._taken.release()
            return
        prepared = jobs[0].prepared if len(jobs) == 1 else None
        run = self._attempt(partial(prepare, [job.request for job in jobs], prepared), jobs)
        if run is None:
            self._taken.release()
        else:
            self._ready.put((jobs, run))

    # --- running them

    def _run_batches(self) -> None:
        while (item := self._ready.get()) is not None:
            jobs, run = item
            with self._changed:
                self._is_running = True
                self._taken.release()  # the next one may be prepared
            start = time.monotonic()
            answers = self._attempt(partial(run, [job.listener() for job in jobs]), jobs)
            seconds = time.monotonic() - start
            if answers is not None:
                for job, answer in zip(jobs, answers, strict=True):
                    job.finish(replace(answer, seconds=_seconds(answer, job, start)))
                self._seconds_per_answer = 0.8 * self._seconds_per_answer + 0.2 * seconds / len(jobs)
                self._on_batch(BatchReport(size=len(jobs), seconds=seconds))
            with self._changed:
                self._is_running = False
                self._changed.notify_all()

    def _attempt(self, work: Callable[[], Any], jobs: list[Job]) -> Any:
        """The result of some work for a batch; None after an error, which the jobs get.

        Jobs of a batch that fails run again one by one, unless a client has got text already.
        """
        try:
            result = attempt(partial(_uncancelled, work))
        except Exception as error:  # after which nothing can be answered
            failure = error if isinstance(error, FastAVError) else FastAVError(f"the model has failed: {error}")
            self._failure = failure
            for job in jobs:
                job.finish(failure)
            return None
        if isinstance(result, Cancelled):
            for job in jobs:
                job.finish(result)
            return None
        if not isinstance(result, FastAVError):
            return result
        if len(jobs) == 1:
            jobs[0].finish(result)
            return None
        for job in jobs:
            if job.has_text:
                job.finish(result)
            else:
                job.is_alone = True
        with self._changed:
            self._jobs.extendleft(reversed([job for job in jobs if not job.has_text]))
            self._changed.notify_all()
        return None


def _seconds(answer: Answer, job: Job, start: float) -> dict[str, float]:
    """The seconds of an answer, with those in the queue and those of its media's decoding.  start: of its batch."""
    seconds = {"queue": max(0.0, start - job.arrived)} | dict(answer.seconds)
    return seconds | {"media": job.media_seconds + seconds.get("media", 0.0)}


def _uncancelled(work: Callable[[], Any]) -> Any:
    """The result of some work, or Cancelled as a result."""
    try:
        return work()
    except Cancelled as cancelled:
        return cancelled
