"""A lock that admits one request at a time to a model."""

import threading
from types import TracebackType

from fastav.errors import FastAVError


class RequestLock:
    """A lock for which threads wait, and which raises where a thread would wait for itself.

    Raises, on entry: FastAVError in the thread that already holds it, such as for a streaming callback that calls its
    own pipeline.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise FastAVError(
                "this pipeline is answering a request in this thread, and cannot answer another one within it",
                "wait for the answer before you ask again from on_text or a hook, or use another pipeline",
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._owner = None
        self._lock.release()
