"""Streaming of an answer's text while it is generated."""

from collections.abc import Callable
from typing import Any

from transformers import TextStreamer

from fastav.decoding.stopping import Stop


class Stream(TextStreamer):
    """A streamer that passes each finished piece of text to a function, up to the text that stops the answer."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], stop: Stop) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._stop, self._pending, self._stopped = on_text, stop, "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on whole words; transformers calls this.  Text that may begin a stop text waits for the next call."""
        self._pending += text
        stops = [self._pending.index(stop) for stop in self._stop.texts if stop in self._pending]
        longest = max((len(stop) for stop in self._stop.texts), default=1)
        until = min(stops) if stops else len(self._pending) if stream_end else len(self._pending) - longest + 1
        if until > 0 and not self._stopped:
            self._on_text(self._pending[:until])
            self._pending = self._pending[until:]
        self._stopped = self._stopped or bool(stops)
