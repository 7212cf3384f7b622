"""One request at a time on one model: other threads wait for their turn."""

import threading
from types import TracebackType

from fastav.errors import FastAVError


class RequestLock:
    """A lock that threads queue for, and that says so where a thread would wait for itself.

    Raises, on entry: FastAVError in the thread that has it already, as where a streaming callback asks its pipeline.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise FastAVError(
                "this pipeline is answering a request in this thread, and cannot answer another one within it",
                "ask from on_text or a hook only once the answer is there, or in another pipeline",
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._owner = None
        self._lock.release()
