"""Streaming of the text of answers while they are generated."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from fastav.decoding.stopping import Stop
from fastav.engine import Listener
from fastav.request_lock import Cancellation, JointCancellation

WINDOW = 64  # last tokens that are decoded again with each new one; at most twice as many
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # ends a text whose last token is part of a character


class Stream:
    """A streamer for `generate` that passes each new piece of text to a function, up to the text that stops the answer.

    The pieces joined are the text of the tokens. cancellation: is checked at every token, so that a cancelled request
    ends within one.
    Raises: Cancelled.
    """

    def __init__(
        self, tokenizer: Any, on_text: Callable[[str], None], stop: Stop, cancellation: Cancellation | None = None
    ) -> None:
        self._tokenizer, self._on_text, self._stop, self._cancellation = tokenizer, on_text, stop, cancellation
        self._has_prompt = False
        self._ids: list[int] = []  # of the answer, from some token on
        self._decoded = ""  # the text of these tokens that is in `_pending` or passed on
        self._pending, self._stopped = "", False

    def put(self, value: Any) -> None:
        """Take the next tokens, first the prompt's; `generate` calls this."""
        if self._cancellation is not None:
            self._cancellation.check()
        if not self._has_prompt:
            self._has_prompt = True
            return
        self._ids += value.flatten().tolist()
        text = self._decode(self._ids)
        if not text.endswith(INCOMPLETE):
            self._pass_on(text)
            if len(self._ids) > 2 * WINDOW:
                self._ids = self._ids[-WINDOW:]
                self._decoded = self._decode(self._ids)

    def end(self) -> None:
        """Pass on the rest of the text; `generate` calls this after the last token."""
        self._pass_on(self._decode(self._ids), is_end=True)

    def _pass_on(self, text: str, *, is_end: bool = False) -> None:
        """Pass on what is new in the text.  What may be the start of a stop text waits."""
        self._pending += text[len(self._decoded) :]
        self._decoded = text
        stops = [self._pending.index(stop) for stop in self._stop.texts if stop in self._pending]
        longest = max((len(stop) for stop in self._stop.texts), default=1)
        until = min(stops) if stops else len(self._pending) if is_end else len(self._pending) - longest + 1
        if until > 0 and not self._stopped:
            self._on_text(self._pending[:until])
            self._pending = self._pending[until:]
        self._stopped = self._stopped or bool(stops)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class BatchStream:
    """A streamer for `generate` that passes the text of every row of a batch to the row's listener.

    listeners: one per row. end_tokens: ids that end an answer; what follows them in a row is padding.
    Raises: Cancelled once all rows are cancelled.
    """

    def __init__(
        self, tokenizer: Any, listeners: Sequence[Listener], stop: Stop, end_tokens: Collection[int] = ()
    ) -> None:
        self._listeners, self._end_tokens = listeners, frozenset(end_tokens)
        self._rows = [_row_stream(tokenizer, listener, stop) for listener in listeners]
        self._cancellation = JointCancellation([listener.cancellation for listener in listeners])
        self._ended = [False for _ in listeners]
        self._has_prompt = False

    @property
    def abandoned(self) -> list[bool]:
        """The rows for which nobody waits any more."""
        return [one.cancellation is not None and one.cancellation.is_cancelled for one in self._listeners]

    def put(self, value: Any) -> None:
        """Take the next token of every row, first the prompts; `generate` calls this."""
        self._cancellation.check()
        if not self._has_prompt:
            self._has_prompt = True
            return
        for number, (row, token) in enumerate(zip(self._rows, value.flatten(), strict=True)):
            if row is None or self._ended[number]:
                continue
            if int(token) in self._end_tokens:
                self._end(number)
            else:
                row.put(token)

    def end(self) -> None:
        """Pass on the rest of the texts; `generate` calls this after the last token."""
        for number, row in enumerate(self._rows):
            if row is not None and not self._ended[number]:
                self._end(number)

    def _end(self, number: int) -> None:
        self._ended[number] = True
        row = self._rows[number]
        assert row is not None
        row.end()


def _row_stream(tokenizer: Any, listener: Listener, stop: Stop) -> Stream | None:
    """The stream of one row, behind its prompt; None if nobody reads it."""
    if listener.on_text is None:
        return None
    stream = Stream(tokenizer, listener.on_text, stop)
    stream.put(None)  # in place of the prompt
    return stream
