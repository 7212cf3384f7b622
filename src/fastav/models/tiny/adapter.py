"""What the rest of fastav must know about the model that comes with it."""

import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, ClassVar

from transformers import ProcessorMixin

from fastav.adapter import Prepared, Request, VllmInputs
from fastav.errors import FastAVWarning
from fastav.models._adapters import preset_plans
from fastav.models.tiny.modeling import FastAVTinyForConditionalGeneration
from fastav.models.videollama2 import VideoLlama2Adapter, VideoLlama2Config
from fastav.plan import Keep, Plan, Share


class TinyAdapter(VideoLlama2Adapter):
    """VideoLLaMA2's architecture at three million parameters, trained on the toy world; its weights are in the package.

    The paper has no settings for it. As for VideoLLaMA2, all video stays at the global cut and of the audio the
    beginning, but half of it: there a clip's last seconds are padding, here they may hold a beep.
    """

    name = "tiny"
    architectures = frozenset({FastAVTinyForConditionalGeneration.__name__})
    checkpoint = str(files("fastav") / "assets" / "tiny")
    presets: ClassVar[Mapping[str, Plan]] = preset_plans(Keep(audio=Share(0.5)))
    prefix = 1
    model_class: ClassVar[type[FastAVTinyForConditionalGeneration]] = FastAVTinyForConditionalGeneration

    def config(self, source: str | None = None) -> VideoLlama2Config:
        """The configuration in a local folder or hub id; of the model in the package if None."""
        return super().config(self.checkpoint if source is None else source)

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests; warns of words that the model was never taught."""
        for request in requests:
            self._warn(processor, request)
        return super().prepare(processor, requests)

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """What vLLM is given for a request; warns of words that the model was never taught."""
        self._warn(processor, request)
        return super().vllm_inputs(processor, request)

    def _warn(self, processor: ProcessorMixin, request: Request) -> None:
        if words := unknown_words(processor, request.question):
            named = ", ".join(map(repr, words))
            some = "the word" if len(words) == 1 else "the words"
            warnings.warn(
                f"{self.name} does not know {some} {named}, so its answer says nothing about that: "
                "it knows the words of its toy world only (docs/tiny.md)",
                FastAVWarning,
                stacklevel=3,
            )


def unknown_words(processor: ProcessorMixin, question: str) -> list[str]:
    """The words of a question that the tokenizer has no entry for, in their order, each once."""
    tokenizer: Any = getattr(processor, "tokenizer")  # noqa: B009  (each processor has it, their base does not)
    read = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    pieces = (
        question[start:end]
        for token, (start, end) in zip(read["input_ids"], read["offset_mapping"], strict=True)
        if token == tokenizer.unk_token_id
    )
    return list(dict.fromkeys(word.casefold() for word in pieces if word[:1].isalnum()))
