"""An answer's text as it comes."""

from collections.abc import Callable
from typing import Any

from transformers import TextStreamer

from fastav.decoding.stopping import Stop


class Stream(TextStreamer):
    """Hands each finished piece of text to a function, up to the text that stops an answer."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], stop: Stop) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._stop, self._held, self._stopped = on_text, stop, "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers whenever whole words are ready.  What may begin a stop text waits for what follows."""
        self._held += text
        found = [self._held.index(mark) for mark in self._stop.texts if mark in self._held]
        longest = max((len(mark) for mark in self._stop.texts), default=1)
        until = min(found) if found else len(self._held) if stream_end else len(self._held) - longest + 1
        if until > 0 and not self._stopped:
            self._on_text(self._held[:until])
            self._held = self._held[until:]
        self._stopped = self._stopped or bool(found)
