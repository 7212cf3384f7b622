"""The adapter of the embedded model."""

import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, ClassVar

from transformers import ProcessorMixin

from fastav.adapter import Prepared, PreparedTurn, Transcript, VllmInputs
from fastav.budgets import Share
from fastav.errors import FastAVWarning
from fastav.models._adapters import preset_plans
from fastav.models.tiny.modeling import FastAVTinyForConditionalGeneration
from fastav.models.videollama2 import VideoLlama2Adapter, VideoLlama2Config
from fastav.plan import Keep, Plan
from fastav.request import Request


class TinyAdapter(VideoLlama2Adapter):
    """VideoLLaMA2's architecture at three million parameters, trained on the toy world; its weights are in the package.

    The paper has no settings for this model. As for VideoLLaMA2, the global cut keeps all video and the first audio
    tokens, but half of them: the last seconds of a clip are padding there, and may contain a beep here.
    """

    name = "tiny"
    architectures = frozenset({FastAVTinyForConditionalGeneration.__name__})
    checkpoint = str(files("fastav") / "assets" / "tiny")
    presets: ClassVar[Mapping[str, Plan]] = preset_plans(Keep(audio=Share(0.5)))
    prefix = 1
    model_class: ClassVar[type[FastAVTinyForConditionalGeneration]] = FastAVTinyForConditionalGeneration

    def config(self, source: str | None = None) -> VideoLlama2Config:
        """The configuration in a local folder or hub id; None for the embedded model's."""
        return super().config(self.checkpoint if source is None else source)

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests; warns about words that the model does not know."""
        for request in requests:
            self._warn(processor, request)
        return super().prepare(processor, requests)

    def prepare_turn(self, processor: ProcessorMixin, request: Request, earlier: Transcript) -> PreparedTurn:
        """Decode, sample and tokenize new messages; warns about words that the model does not know."""
        self._warn(processor, request)
        return super().prepare_turn(processor, request, earlier)

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """A request as vLLM takes it; warns about words that the model does not know."""
        self._warn(processor, request)
        return super().vllm_inputs(processor, request)

    def _warn(self, processor: ProcessorMixin, request: Request) -> None:
        if words := unknown_words(processor, request.text):
            word_list = ", ".join(map(repr, words))
            noun = "the word" if len(words) == 1 else "the words"
            warnings.warn(
                f"{self.name} does not know {noun} {word_list}, so its answer ignores that: "
                "it knows only the words of its toy world (docs/tiny.md)",
                FastAVWarning,
                stacklevel=3,
            )


def unknown_words(processor: ProcessorMixin, question: str) -> list[str]:
    """The words of a question that are not in the vocabulary, in order, each once."""
    tokenizer: Any = getattr(processor, "tokenizer")  # noqa: B009  (every processor has it, their base class does not)
    encoding = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    pieces = (
        question[start:end]
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        if token == tokenizer.unk_token_id
    )
    return list(dict.fromkeys(word.casefold() for word in pieces if word[:1].isalnum()))
