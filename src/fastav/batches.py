"""Batched answering of many requests: a thread prepares the next batch while the current one runs."""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch

from fastav.engine import Answer, Prepare, Run
from fastav.errors import EngineStopped, FastAVError, PlanNotApplied, reason_of
from fastav.request import Request

T = TypeVar("T")
IndexedRequest = tuple[int, Request]  # the index of a request in the set, and the request
Outcome = tuple[int, Answer | FastAVError]
ReadyBatch = tuple[Sequence[IndexedRequest], Run]  # requests, and the function that answers them

WINDOW_BATCHES = 8  # requests of so many batches are sorted together, so that a batch has requests of similar length


def outcomes(requests: Iterable[Request | FastAVError], prepare: Prepare, batch: int) -> Generator[Outcome, None, None]:
    """Answers or errors, each with the index of its request, in order of completion.

    A batch that fails is retried in halves, down to the requests that fail by themselves. Closing the generator early
    waits for the batch in preparation and leaves no thread behind. requests: read in a thread, one window at a time. An
    error in place of a request comes back as its outcome. prepare: as `Engine.preparer` returns it. Raises: whatever
    reading the requests raises; FastAVError if the device has failed, so that no further request can be answered.
    Outcomes before that have been yielded.
    """
    maker = _BatchMaker(prepare)
    with closing(prefetch(maker.batches(requests, batch))) as batches:
        for failed, ready in batches:
            yield from failed
            yield from _run_batches(ready, maker)


def _run_batches(ready: Sequence[ReadyBatch], maker: "_BatchMaker") -> Iterator[Outcome]:
    for batch_requests, run in ready:
        answers = attempt(run)
        if not isinstance(answers, FastAVError):
            yield from zip((index for index, _ in batch_requests), answers, strict=True)
        elif len(batch_requests) == 1:
            yield batch_requests[0][0], answers
        else:
            failed, halves = maker.split_in_halves(batch_requests)
            yield from failed
            yield from _run_batches(halves, maker)


def prefetch(items: Iterator[T]) -> Generator[T, None, None]:
    """The items of an iterator; a thread produces the next item while the caller uses the current one."""
    end: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="fastav-ahead") as thread:
        future = thread.submit(next, items, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, items, end)
            yield item


def attempt(work: Callable[[], T]) -> T | FastAVError:
    """The result of `work`, or its error without a traceback, so that the error holds no tensors.

    Raises: EngineStopped, PlanNotApplied.
    """
    try:
        return work()
    except (EngineStopped, PlanNotApplied):  # the engine can answer no other request either
        raise
    except FastAVError as error:
        return error.with_traceback(None)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except Exception as error:
        if has_failed_device(error):
            raise FastAVError(
                f"the device has failed: {reason_of(error)}", "start again; the answers so far are correct"
            ) from error
        if "can't allocate memory" not in str(error):
            return as_failure(error)
    return FastAVError("there is not enough memory to answer this", "use a shorter clip, or another device")


def as_failure(error: Exception) -> FastAVError:
    """Any error as the FastAVError of a request, with its cause but without tracebacks, which hold tensors."""
    if isinstance(error, FastAVError):
        return error.with_traceback(None)
    failure = FastAVError(f"this could not be answered: {reason_of(error, with_type=True)}")
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None  # whose frames hold tensors
        cause = cause.__cause__ or cause.__context__
    failure.__cause__ = error
    return failure


def has_failed_device(error: Exception) -> bool:
    """Whether this process can no longer run anything on the device."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


class _BatchMaker:
    """Makes batches, one at a time: a failed batch can be split while a thread makes the next one."""

    def __init__(self, prepare: Prepare) -> None:
        self._prepare, self._lock = prepare, threading.Lock()

    def batches(
        self, requests: Iterable[Request | FastAVError], batch: int
    ) -> Iterator[tuple[list[Outcome], list[ReadyBatch]]]:
        """The failures since the previous batch, and the ready parts of the next batch: one part if nothing fails.

        The longest requests of a window come first, so that a lack of memory shows early.
        """
        indexed = enumerate(requests)
        while window := list(islice(indexed, WINDOW_BATCHES * batch)):
            failed: list[Outcome] = []
            with_length: list[tuple[Any, IndexedRequest]] = []
            for index, request in window:
                length = request if isinstance(request, FastAVError) else attempt(partial(length_key, request))
                if isinstance(length, FastAVError):
                    failed.append((index, length))
                else:
                    assert isinstance(request, Request)
                    with_length.append((length, (index, request)))
            ordered = [
                batch_requests for _, batch_requests in sorted(with_length, key=lambda pair: pair[0], reverse=True)
            ]
            for start in range(0, len(ordered), batch):
                with self._lock:
                    more, ready = self._parts(ordered[start : start + batch])
                yield failed + more, ready
                failed = []
            if failed:
                yield failed, []

    def split_in_halves(self, batch_requests: Sequence[IndexedRequest]) -> tuple[list[Outcome], list[ReadyBatch]]:
        """The two halves of a failed batch: failures of their preparation, and ready parts."""
        with self._lock:
            return self._halves(batch_requests)

    def _parts(self, batch_requests: Sequence[IndexedRequest]) -> tuple[list[Outcome], list[ReadyBatch]]:
        run = attempt(partial(self._prepare, [request for _, request in batch_requests]))
        if not isinstance(run, FastAVError):
            return [], [(batch_requests, run)]
        if len(batch_requests) == 1:
            return [(batch_requests[0][0], run)], []
        return self._halves(batch_requests)

    def _halves(self, batch_requests: Sequence[IndexedRequest]) -> tuple[list[Outcome], list[ReadyBatch]]:
        middle = len(batch_requests) // 2
        (failed, ready), (more_failed, more_ready) = (
            self._parts(batch_requests[:middle]),
            self._parts(batch_requests[middle:]),
        )
        return failed + more_failed, ready + more_ready


def length_key(request: Request) -> tuple[bool, bool, int, float, int]:
    """A sort key for the length of a prompt that needs no decoding, most important part first.

    Its parts are whether video is used, whether audio is used, the number of media, the seconds of the tracks used, and
    the characters of the messages. Raises: MissingTrack.
    """
    video, audio = request.tracks
    return video, audio, len(request.media), sum(one.seconds for one in request.media), len(request.text)
