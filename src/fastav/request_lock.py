"""A lock that admits one request at a time to a model, and requests that are cancelled while they wait or run."""

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import TracebackType

from fastav.errors import FastAVError

POLL = 0.05  # seconds after which a request that waits for its turn looks whether it is cancelled


class Cancelled(Exception):
    """A request was cancelled, by the one who made it."""


class Cancellation:
    """A request's switch: one thread cancels the request, and the thread that works on it checks."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """End the request at its next check."""
        self._event.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether the request is cancelled, or nobody waits for it any more."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise Cancelled if the request is cancelled."""
        if self.is_cancelled:
            raise Cancelled


class JointCancellation(Cancellation):
    """The switches of the requests of a batch: the batch is cancelled once all are."""

    def __init__(self, parts: Sequence[Cancellation | None]) -> None:
        super().__init__()
        self._parts = parts

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for any of the requests."""
        return super().is_cancelled or all(part is not None and part.is_cancelled for part in self._parts)


class RequestLock:
    """A lock for which threads wait, and which raises where a thread would wait for itself.

    Raises, on entry: FastAVError in the thread that already holds it, such as for a streaming callback that calls its
    own pipeline.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def turn(self, cancellation: Cancellation | None) -> Generator[None]:
        """Hold the lock, as `with lock` does, for a request that can be cancelled while it waits.

        Raises: Cancelled, and what entering the lock raises.
        """
        if cancellation is None:
            with self:
                yield
            return
        self.refuse_owner()
        while not self._lock.acquire(timeout=POLL):
            cancellation.check()
        self._owner = threading.get_ident()
        try:
            cancellation.check()
            yield
        finally:
            self._release()

    def __enter__(self) -> None:
        self.refuse_owner()
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    def refuse_owner(self) -> None:
        """Raise FastAVError in the thread that holds the lock."""
        if self._owner == threading.get_ident():
            raise FastAVError(
                "this pipeline is answering a request in this thread, and cannot answer another one within it",
                "wait for the answer before you ask again from on_text or a hook, or use another pipeline",
            )

    def _release(self) -> None:
        self._owner = None
        self._lock.release()
