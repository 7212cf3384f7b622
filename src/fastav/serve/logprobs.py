"""Log probabilities of the tokens of an answer, recorded while it is generated."""

from threading import Lock
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor


class LogprobRecorder(LogitsProcessor):
    """Records, at every step of an answer, the log probabilities of its most likely tokens and of the one chosen.

    They are those after the penalties of the settings and before temperature and the restrictions of sampling. For a
    batch of one request. top: number of most likely tokens.
    """

    def __init__(self, tokenizer: Any, top: int) -> None:
        self._tokenizer, self._top = tokenizer, top
        self._last: Tensor | None = None  # of the step whose token is not known yet
        self._steps: list[tuple[int, float, list[tuple[int, float]]]] = []
        self._lock = Lock()

    def __call__(
        self, input_ids: Int[Tensor, "1 tokens"], scores: Float[Tensor, "1 vocabulary"]
    ) -> Float[Tensor, "1 vocabulary"]:
        """Record a step; the scores stay as they are."""
        with self._lock:
            if self._last is not None:
                self._record(int(input_ids[0, -1]))
            self._last = scores[0].float().log_softmax(-1)
        return scores

    def steps(self, start: int, tokens: tuple[int, ...] | None = None) -> list[dict[str, Any]]:
        """The steps from one on, as in OpenAI's API.

        tokens: of the whole answer, once it is known; before that, the last step lacks its token and is left out.
        """
        with self._lock:
            if tokens is not None and self._last is not None and len(self._steps) < len(tokens):
                self._record(tokens[len(self._steps)])
            known = self._steps[: None if tokens is None else len(tokens)]
        before = [None, *(token for token, _, _ in known)]
        return [
            self._entry(token, value, last) | {"top_logprobs": [self._entry(*one, last) for one in top]}
            for (token, value, top), last in zip(known[start:], before[start:], strict=False)
        ]

    def _record(self, token: int) -> None:
        assert self._last is not None
        top = torch.topk(self._last, self._top) if self._top else None
        best = [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        self._steps.append((token, float(self._last[token]), best))
        self._last = None

    def _entry(self, token: int, value: float, last: int | None) -> dict[str, Any]:
        """A token.  last: the one before it, because some tokenizers leave out a space at the start of a text."""
        text: str = self._tokenizer.decode([token])
        if last is not None:
            start, both = self._tokenizer.decode([last]), self._tokenizer.decode([last, token])
            text = both[len(start) :] if both.startswith(start) else text
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # else the token is a part of a character
        return {"token": text, "logprob": max(value, -9999.0), "bytes": list(text.encode()) if whole else None}
