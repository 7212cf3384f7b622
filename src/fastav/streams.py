"""Streams: the text of an answer, piece by piece, while a thread generates it.

The thread does not wait for the reader: it keeps the pieces that are not read yet, at most the answer's text. So a slow
reader holds up neither the model nor other requests.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from queue import SimpleQueue
from typing import Any

from fastav.engine import Answer
from fastav.errors import FastAVError
from fastav.request_lock import Cancellation, Cancelled

Ask = Callable[[Callable[[str], None], Cancellation], Answer]
"""Answers a request, passes each piece of text to the function, and ends soon after the cancellation."""

THREAD = "fastav-stream"  # the start of the names of threads


class _Stream:
    """One answer that a thread generates; the base of both kinds of streams."""

    def __init__(self, ask: Ask) -> None:
        self._ask, self._cancellation = ask, Cancellation()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._answer: Answer | None = None  # at the end

    @property
    def answer(self) -> Answer:
        """The whole answer, with its costs, after the last piece.

        Raises: FastAVError before that, and for a stream that was closed early or that ended in an error.
        """
        if self._answer is None:
            state = "ended early" if self._cancellation.is_cancelled else "has not ended"
            raise FastAVError(f"the stream {state}, so there is no answer", "read all its pieces first")
        return self._answer

    def _end(self, item: Any) -> None:
        """Take the last item: keep an answer, and raise an error."""
        if isinstance(item, Answer):
            self._answer = item
        elif not isinstance(item, Cancelled):
            raise item

    def _start(self, deliver: Callable[[Any], None]) -> threading.Thread:
        """Start the thread.  deliver: gets every piece, then the answer or an error.

        Raises: FastAVError if the stream was started or closed before.
        """
        with self._starting:
            if self._thread is not None or self._cancellation.is_cancelled:
                raise FastAVError("a stream can be read once, and this one was", "make a new one: pipe.stream(...)")
            work = (self._ask, self._cancellation, deliver)  # not `self`, which is to be freed when its reader drops it
            self._thread = threading.Thread(target=_work, args=work, name=THREAD)
            self._thread.start()
            return self._thread

    def _cancel(self) -> threading.Thread | None:
        """Stop the thread within one token, and return it, if it was started."""
        self._cancellation.cancel()
        with self._starting:
            return self._thread


def _work(ask: Ask, cancellation: Cancellation, deliver: Callable[[Any], None]) -> None:
    result: Answer | BaseException
    try:
        cancellation.check()
        result = ask(deliver, cancellation)
    except BaseException as error:  # for the reader
        result = error
    deliver(result)


class TextStream(_Stream):
    """The pieces of an answer.  Made by `Pipeline.stream`.

    Iterate over it once. Joined, the pieces are the answer's text, up to spaces at both ends; a text of `stop_strings`
    is not among them. Leaving the loop, by `break` or an error, stops the answer within one token and waits for that,
    as do `close` and the end of a `with` block: then no thread and no hook is left, and the model is free.
    """

    def __iter__(self) -> Iterator[str]:
        """Generate the answer, and yield its text.  Raises: what the answer raises."""
        pieces: SimpleQueue[Any] = SimpleQueue()
        thread = self._start(pieces.put)
        try:
            while isinstance(item := pieces.get(), str):
                yield item
            self._end(item)
        finally:
            self._cancellation.cancel()
            thread.join()

    def close(self) -> None:
        """Stop the answer within one token, and wait for that.  Further calls do nothing."""
        if (thread := self._cancel()) is not None:
            thread.join()

    def __enter__(self) -> "TextStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncTextStream(_Stream):
    """The pieces of an answer, for asyncio.  Made by `Pipeline.astream`.

    As `TextStream`. Cancelling the task that reads stops the answer within one token. After a `break`, Python closes
    the loop's generator when the event loop runs again; `async with` or `aclose` wait for it.
    """

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        self._ended = asyncio.Event()

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        """Generate the answer, and yield its text.  Raises: what the answer raises."""
        loop, pieces, ended = asyncio.get_running_loop(), asyncio.Queue[Any](), self._ended
        cancellation = self._cancellation

        def take(item: Any) -> None:
            pieces.put_nowait(item)
            if not isinstance(item, str):
                ended.set()

        def deliver(item: Any) -> None:
            try:
                loop.call_soon_threadsafe(take, item)
            except RuntimeError:  # the loop is closed, and nobody reads
                cancellation.cancel()

        thread = self._start(deliver)
        try:
            while isinstance(item := await pieces.get(), str):
                yield item
            self._end(item)
        finally:
            self._cancellation.cancel()
            await ended.wait()
            thread.join()

    async def aclose(self) -> None:
        """Stop the answer within one token, and wait for that.  Further calls do nothing."""
        if (thread := self._cancel()) is not None:
            await self._ended.wait()
            thread.join()

    async def __aenter__(self) -> "AsyncTextStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
