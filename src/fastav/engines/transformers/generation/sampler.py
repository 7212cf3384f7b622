"""Choice of the next token, detection of an answer's end, and copies of tokens to the host."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from fastav.decoding.stopping import Stop
from fastav.decoding.streaming import BatchStream

MAX_LAG = 4  # steps that may be queued on a GPU before the host reads an earlier token


class TokenSource(ABC):
    """Where the decoding loop gets the next token of every row from.

    ids: the prompts and the tokens so far, [batch, tokens].
    """

    ids: Any

    @abstractmethod
    def take(self, logits: Float[Tensor, "batch vocabulary"]) -> Int[Tensor, " batch"]:
        """The next token of every row, after these logits."""

    @property
    @abstractmethod
    def n_left(self) -> int:
        """The largest number of tokens that can still be taken."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether no further token is needed."""

    @abstractmethod
    def output(self) -> Tensor | GenerateDecoderOnlyOutput:
        """What `generate` returns."""


class TokenSampler(TokenSource):
    """Chooses the next token of every row, and when to stop, exactly as `GenerationMixin._sample` does."""

    def __init__(
        self,
        ids: Int[Tensor, "batch prompt"],
        config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: Any,
        stream: "HostStream",
    ) -> None:
        self.ids, self._prompt = ids, ids.shape[1]
        self._config, self._processors, self._criteria = config, processors, criteria
        self._has_end_token = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        self._stream = stream
        self._logits: list[Tensor] = []
        self._scores: list[Tensor] = []

    def take(self, logits: Float[Tensor, "batch vocabulary"]) -> Int[Tensor, " batch"]:
        """Choose the next token of every row."""
        raw: Any = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self._processors(self.ids, raw)
        token = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self._config.do_sample else scores.argmax(-1)
        if self._has_end_token:
            pad: Any = self._config._pad_token_tensor  # pyright: ignore[reportAttributeAccessIssue]
            token = torch.where(self._unfinished.bool(), token, pad)
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        if self._config.return_dict_in_generate and self._config.output_logits:
            self._logits.append(raw)
        if self._config.return_dict_in_generate and self._config.output_scores:
            self._scores.append(scores)
        self._unfinished = self._unfinished & ~self._criteria(self.ids, tuple(self._scores) or None)
        self._stream.put(token, self._unfinished)
        return token

    @property
    def n_left(self) -> int:
        """The number of tokens until the maximum length."""
        max_length: Any = self._config.max_length
        return max_length - self.ids.shape[1]

    @property
    def done(self) -> bool:
        """Whether all rows are known to have ended."""
        return self._stream.ended or self.n_left <= 0

    def output(self) -> Tensor | GenerateDecoderOnlyOutput:
        """The output of `generate`, without the cache."""
        n_new = self._stream.finish()
        sequences = self.ids[:, : self._prompt + n_new]
        if not self._config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # pyright: ignore[reportArgumentType]
            logits=_first_steps(self._logits, n_new),
            scores=_first_steps(self._scores, n_new),
        )


class HostStream:
    """Copies tokens to the host: on a GPU some steps late, so that neither host nor GPU waits for the other."""

    def __init__(
        self, prompt: Int[Tensor, "batch prompt"], streamer: Any, stop: Stop | None, *, do_sample: bool = False
    ) -> None:
        self._lag = MAX_LAG if prompt.device.type == "cuda" else 0
        self._do_sample = do_sample  # then the lag is constant: how many tokens are sampled must not depend on timing
        self._streamer, self._stop = streamer, stop
        self._pending: deque[tuple[Tensor, Any]] = deque()
        self._rows: list[list[int]] = [[] for _ in prompt]
        self._stopped = [False for _ in prompt]
        self._n_steps = 0
        self.ended = False
        if streamer is not None:
            streamer.put(prompt.cpu())

    def put(self, token: Int[Tensor, " batch"], unfinished: Int[Tensor, " batch"]) -> None:
        """Add one token of every row, and which rows continue."""
        self._pending.append(_to_host(torch.stack([unfinished, token])))
        while self._pending and (
            len(self._pending) > self._lag or (not self._do_sample and self._pending[0][1].query())
        ):
            self._read()

    def finish(self) -> int:
        """Read all pending tokens, and return the number of steps until all rows had ended."""
        while self._pending:
            self._read()
        if self._streamer is not None:
            self._streamer.end()
        return self._n_steps

    def _read(self) -> None:
        step, event = self._pending.popleft()
        event.synchronize()
        if self.ended:
            return
        unfinished, token = step
        self._n_steps += 1
        for number, (row, token_id) in enumerate(zip(self._rows, token.tolist(), strict=True)):
            row.append(token_id)
            if self._stop is not None and not self._stopped[number]:
                self._stopped[number] = self._stop.reached(row[-self._stop.span :])
        abandoned = self._streamer.abandoned if isinstance(self._streamer, BatchStream) else [False] * len(self._rows)
        self.ended = not any(
            running and not (stopped or left)
            for running, stopped, left in zip(unfinished.tolist(), self._stopped, abandoned, strict=True)
        )
        if self._streamer is not None:
            self._streamer.put(token)


class _NoEvent:
    """A stand-in for a CUDA event if tensors are on the CPU already."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _to_host(tensor: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host, and the event after which you can read it."""
    if tensor.device.type != "cuda":
        return tensor, _NoEvent()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


def _first_steps(steps: Sequence[Tensor], number: int) -> Any:
    return tuple(steps[:number]) or None
