"""Which token comes next, until when, and how the host gets to know."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from fastav.decoding.stopping import Stop
from fastav.engine import Sampling

AHEAD = 4  # steps that a GPU may be given before the host has seen what an earlier one said


def settings(sampling: Sampling) -> dict[str, Any]:
    """As `generate` takes them, but for stop texts; None where the model's own settings hold, or are not read.

    Greedy decoding reads no temperature, and transformers warns when a checkpoint's own file sets one.
    """
    drawn = sampling.temperature > 0
    settings: dict[str, Any] = {
        "do_sample": drawn,
        "num_beams": 1,
        "temperature": float(sampling.temperature) if drawn else None,
        "top_p": float(sampling.top_p) if drawn else None,
        "top_k": sampling.top_k or 0 if drawn else None,
    }
    if sampling.repetition_penalty is not None:
        settings["repetition_penalty"] = float(sampling.repetition_penalty)
    return settings


class Chosen:
    """The tokens so far, and whether there are to be more.  Says what `GenerationMixin._sample` would."""

    def __init__(
        self,
        ids: Int[Tensor, "batch prompt"],
        config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: Any,
        echo: "Echo",
    ) -> None:
        self.ids, self._prompt = ids, ids.shape[1]
        self._config, self._processors, self._criteria = config, processors, criteria
        self._ends = any(hasattr(one, "eos_token_id") for one in criteria)
        self._unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        self._echo = echo
        self._logits: list[Tensor] = []
        self._scores: list[Tensor] = []

    def take(self, logits: Float[Tensor, "batch vocabulary"]) -> Int[Tensor, " batch"]:
        """The next token of every row."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self._processors(self.ids, logits)
        token = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self._config.do_sample else scores.argmax(-1)
        if self._ends:
            pad: Any = self._config._pad_token_tensor  # pyright: ignore[reportAttributeAccessIssue]
            token = torch.where(self._unfinished.bool(), token, pad)
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        if self._config.return_dict_in_generate and self._config.output_logits:
            self._logits.append(logits)
        if self._config.return_dict_in_generate and self._config.output_scores:
            self._scores.append(scores)
        self._unfinished = self._unfinished & ~self._criteria(self.ids, tuple(self._scores) or None)
        self._echo.put(token, self._unfinished)
        return token

    @property
    def left(self) -> int:
        """Tokens until there are as many as there may be."""
        longest: Any = self._config.max_length
        return longest - self.ids.shape[1]

    @property
    def done(self) -> bool:
        """Whether all rows are known to have ended."""
        return self._echo.ended or self.left <= 0

    def output(self) -> Tensor | GenerateDecoderOnlyOutput:
        """As `generate` returns it, but for the cache."""
        new = self._echo.finish()
        sequences = self.ids[:, : self._prompt + new]
        if not self._config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # pyright: ignore[reportArgumentType]
            logits=_recorded(self._logits, new),
            scores=_recorded(self._scores, new),
        )


class Echo:
    """Brings what was chosen to the host: on a GPU some steps late, so that neither waits for the other."""

    def __init__(
        self, prompt: Int[Tensor, "batch prompt"], streamer: Any, stop: Stop | None, *, drawn: bool = False
    ) -> None:
        self._late = AHEAD if prompt.device.type == "cuda" else 0
        self._drawn = drawn  # then the host is always as late: how many tokens are drawn must not depend on its luck
        self._streamer, self._stop = streamer, stop
        self._coming: deque[tuple[Tensor, Any]] = deque()
        self._told: list[list[int]] = [[] for _ in prompt]
        self._stopped = [False for _ in prompt]
        self._seen = 0
        self.ended = False
        if streamer is not None:
            streamer.put(prompt.cpu())

    def put(self, token: Int[Tensor, " batch"], unfinished: Int[Tensor, " batch"]) -> None:
        """One more token of every row, and which rows go on."""
        self._coming.append(_to_host(torch.stack([unfinished, token])))
        while self._coming and (len(self._coming) > self._late or (not self._drawn and self._coming[0][1].query())):
            self._read()

    def finish(self) -> int:
        """How many tokens there were until all rows had ended."""
        while self._coming:
            self._read()
        if self._streamer is not None:
            self._streamer.end()
        return self._seen

    def _read(self) -> None:
        told, event = self._coming.popleft()
        event.synchronize()
        if self.ended:
            return
        unfinished, token = told
        self._seen += 1
        for number, (row, one) in enumerate(zip(self._told, token.tolist(), strict=True)):
            row.append(one)
            if self._stop is not None and not self._stopped[number]:
                self._stopped[number] = self._stop.reached(row[-self._stop.span :])
        self.ended = not any(on and not over for on, over in zip(unfinished.tolist(), self._stopped, strict=True))
        if self._streamer is not None:
            self._streamer.put(token)


class _Here:
    """What a CPU's tensors wait for: nothing."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _to_host(tensor: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host, and the event after which it is there."""
    if tensor.device.type != "cuda":
        return tensor, _Here()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


def _recorded(steps: Sequence[Tensor], number: int) -> Any:
    return tuple(steps[:number]) or None
