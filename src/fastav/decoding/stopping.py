"""Stop texts: texts at which an answer ends."""

from collections.abc import Sequence
from typing import Any


class Stop:
    """Texts at which an answer ends.

    span: the number of last tokens to search after each new token: the length in bytes of the longest text, and a few
    more, as the first of these tokens may be part of a character.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self._tokenizer, self.texts = tokenizer, tuple(texts)
        self.span = max((len(text.encode()) for text in texts), default=0) + 8

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether the text of these tokens contains a stop text."""
        if not self.texts:
            return False
        text = self._decode(ids)
        return any(stop in text for stop in self.texts)

    def cut(self, ids: Sequence[int]) -> tuple[Sequence[int], str, bool]:
        """The tokens up to the one that completes a stop text, the text before it, and whether there is a stop text.

        A row that has stopped may have more tokens, as long as another row of its batch continues.
        """
        if not self.reached(ids):
            return ids, self._decode(ids), False
        ids = next(ids[:n] for n in range(1, len(ids) + 1) if self.reached(ids[:n]))
        text = self._decode(ids)
        return ids, text[: min(text.index(stop) for stop in self.texts if stop in text)], True

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
