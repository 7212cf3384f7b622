"""Texts at which an answer ends."""

from collections.abc import Sequence
from typing import Any


class Stop:
    """Texts at which an answer ends.

    span: how many tokens, the last ones, are looked at when one more has come: as many as the longest text has bytes,
    and some, as the first of them may be part of a letter.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self._tokenizer, self.texts = tokenizer, tuple(texts)
        self.span = max((len(text.encode()) for text in texts), default=0) + 8

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether one of them is in what these tokens say."""
        if not self.texts:
            return False
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return any(mark in text for mark in self.texts)

    def cut(self, ids: Sequence[int]) -> tuple[Sequence[int], str, bool]:
        """The tokens up to the first that completes one, what they say before it, and whether there is one.

        Behind a row that has stopped there may be more, for as long as another row of its batch goes on.
        """
        if not self.reached(ids):
            return ids, self._tokenizer.decode(ids, skip_special_tokens=True), False
        ids = next(ids[:n] for n in range(1, len(ids) + 1) if self.reached(ids[:n]))
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return ids, text[: min(text.index(mark) for mark in self.texts if mark in text)], True
