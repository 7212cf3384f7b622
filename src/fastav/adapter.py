"""The interface of model families: how to load a model, which token is what in its prompts, and where its decoder is.

A family is a folder `models/<name>/` that exports `<Name>Adapter`; fastav finds it by its name and by
`config.architectures`. Only that folder knows the family's token ids, processor and tensor names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from fastav import token_mixing
from fastav.compatibility import require_tested
from fastav.errors import FastAVError, PlanError, UnsupportedModel
from fastav.flops import DecoderShape
from fastav.installation import importable
from fastav.layout import Layout, Modality
from fastav.plan import Plan
from fastav.presets import NONE
from fastav.recipes import recipe
from fastav.registry import MODELS, RECIPES, unknown_name
from fastav.request import Request
from fastav.target import Target

require_tested("torch", "transformers")

with importable():  # in most programs the first import of transformers' models, which a broken package makes fail
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Arguments of a model's `forward` for a batch of requests (left-padded), and the layout of each row."""

    inputs: Mapping[str, Any]
    layouts: tuple[Layout, ...]


Render = Callable[[Sequence[Mapping[str, Any]]], str]
_ANSWER = "fastav-answer-goes-here"


@dataclass(frozen=True, slots=True, eq=False)
class Transcript:
    """A conversation as its model's chat template has it.

    messages: for the template, with stand-ins for media. text: rendered, up to the start of the last answer. tools: for
    the template.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    def answered(self, text: str) -> "Transcript":
        """The transcript with an answer to its last message."""
        message = {"role": "assistant", "content": text}
        return replace(self, messages=(*self.messages, message))

    def continued(self, new: Sequence[Mapping[str, Any]], render: Render) -> "tuple[Transcript, str]":
        """The transcript with new messages, and the text that they add, up to the start of the next answer.

        render: the text of messages.
        Raises: FastAVError if the template renders earlier messages in another way than before.
        """
        messages = (*self.messages, *new)
        transcript = replace(self, messages=messages, text=render(messages))
        if not self.messages:
            return transcript, transcript.text
        answer = {**self.messages[-1], "content": _ANSWER}  # templates may trim the text itself
        start, mark, added = render((*self.messages[:-1], answer, *new)).partition(_ANSWER)
        if not mark or start != self.text:
            raise FastAVError(
                "the chat template renders earlier messages in another way once others follow: the cache does not fit",
                "pass replan=True to prefill the whole conversation",
            )
        return transcript, added


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedTurn:
    """What a request adds to a conversation: arguments of `forward` and their layout; and the whole transcript."""

    inputs: Mapping[str, Any]
    layout: Layout
    transcript: Transcript


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VllmInputs:
    """A request as vLLM takes it: vLLM's copy of the family's processor turns it into the inputs of `prepare`.

    text: the conversation, with the family's placeholder for each medium. media: by modality, for `multi_modal_data`.
    options: of the processor's call, for `mm_processor_kwargs`.
    """

    text: str
    media: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncoderCall:
    """One call of an encoder, which is about to run.

    config: of the model. model_inputs: arguments of the model's `forward`, or of `generate`, which calls the encoders
    of some models before the first forward. inputs: arguments of the encoder. number: how many calls of this encoder
    came before, for the same prompts.
    """

    config: PreTrainedConfig
    model_inputs: Mapping[str, Any]
    inputs: Mapping[str, Any]
    number: int


class EncoderAttention(ABC):
    """The attention that a family's media tokens receive in the last layer of one of its encoders.

    modalities: of these tokens. The model calls the encoder once for each that is in the prompts, in this order, with
    all media of the batch.
    """

    modalities: ClassVar[tuple[Modality, ...]]

    @abstractmethod
    def modules(self, model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
        """The encoder, and the attention of its last layer that runs, which each call of the encoder calls once."""

    def begin(self, call: EncoderCall) -> Any:
        """What `scores` must know of a call of the encoder, by default the call itself.

        To read numbers from the device costs less here than in `scores`: no layer of the encoder is in its queue yet.
        """
        return call

    @abstractmethod
    def scores(self, attention: nn.Module, call: Any, attention_inputs: Mapping[str, Any]) -> Float[Tensor, " tokens"]:
        """The attention that each token of one modality receives, in the order of the prompts.

        It is the mean over heads and over the queries that may see the token, in float32, pooled as the encoder and its
        projector pool their output; 0 for tokens of this modality that the encoder does not make. call: from `begin`.
        attention_inputs: arguments by name of the attention's call.
        """


class ModelAdapter(ABC):
    """The base class of model families.

    name: the registry's name of the family. architectures: class names in a configuration's `architectures`.
    checkpoint: hub id of the released weights. revision: revision of the checkpoint, None for the main one. presets:
    plans by name. supports_audio, supports_images: whether the model takes sound,
    and images that are no video of one frame. packages: required packages besides transformers.
    decode_syncs: whether a decoding step reads values from the device, so that it cannot be captured. cache_limit: when
    the model's own code drops its cache during an answer, for messages.
    """

    name: ClassVar[str]
    architectures: ClassVar[frozenset[str]]
    checkpoint: ClassVar[str]
    revision: ClassVar[str | None] = None
    presets: ClassVar[Mapping[str, Plan]]
    supports_audio: ClassVar[bool] = True
    supports_images: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ()
    decode_syncs: ClassVar[bool] = True
    prefix: ClassVar[int] = 0  # tokens of a typical prompt before the clip
    cache_limit: ClassVar[str] = ""

    def preset(self, name: str) -> Plan:
        """The preset plan of this name; `none` prunes nothing.  Raises: UnknownName."""
        known = {"none": NONE, **self.presets}
        if name not in known:
            raise unknown_name(f"plan of {self.name}", name, known)
        return known[name]

    @abstractmethod
    def config(self, source: str | None = None) -> PreTrainedConfig:
        """The configuration in a local folder or hub id; None for the released model's, without any download."""

    @abstractmethod
    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Model (in evaluation mode) and processor from a local folder or a hub id.

        options: as for `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).
        Raises: CheckpointError if keys are missing, unexpected, or of another shape.
        """

    @abstractmethod
    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of this configuration, without loading weights."""

    @abstractmethod
    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests."""

    def prepare_turn(self, processor: ProcessorMixin, request: Request, earlier: Transcript) -> PreparedTurn:
        """Decode, sample and tokenize the new messages of a conversation.  earlier: up to its last answer.

        Raises: UnsupportedModel if this family has no conversations; FastAVError if the chat template renders earlier
        messages in another way than before; otherwise as `prepare`.
        """
        raise UnsupportedModel(f"{self.name} has no conversations", "pass all messages to the pipeline")

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """Decode and sample a request as `prepare` does, for vLLM to tokenize.

        Raises: UnsupportedModel if this family cannot run in vLLM; otherwise as `prepare`.
        """
        raise UnsupportedModel(f"{self.name} has no inputs for vLLM", "use the engine transformers")

    @abstractmethod
    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone."""

    def example(
        self,
        config: PreTrainedConfig,
        *,
        seconds: float | int | None = None,
        audio: int | None = None,
        video: int | None = None,
        text: int,
    ) -> Layout:
        """The layout of a typical prompt about a clip of 1280 x 720 with sound, for estimates without media.

        seconds: length of the clip (None: a length that is typical of the family). audio, video: numbers of tokens
        (None: those of such a clip). text: number of text tokens.
        """
        prefix = min(self.prefix, text)
        clip = self.example_clip(config, None if seconds is None else float(seconds), audio, video)
        return Layout.join([Layout.of(Modality.TEXT, prefix), clip, Layout.of(Modality.TEXT, text - prefix)])

    @abstractmethod
    def example_clip(
        self, config: PreTrainedConfig, seconds: float | None, audio: int | None, video: int | None
    ) -> Layout:
        """The clip in the prompt that `example` describes.  Arguments as for `example`."""

    @abstractmethod
    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The decoder's dimensions."""

    def language_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The part of a model that reads the prompt and writes text: the model itself, unless it also has a talker.

        `decoder` and `encoders` receive this part.
        """
        return model

    @abstractmethod
    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The module whose `layers` are the decoder layers."""

    @abstractmethod
    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The modules that turn audio and video into embeddings, projectors included; `Answer.seconds` times them."""

    # What follows reads transformers' conventions. A family that does these things in another way overrides it.

    def deepstack_method(self, decoder: nn.Module) -> str | None:
        """The name of the decoder's method that adds visual features after early layers; None if it has none."""
        return "_deepstack_process" if hasattr(decoder, "_deepstack_process") else None

    def stacks_hidden_states(self, config: PreTrainedConfig) -> bool:
        """Whether layers pass on several hidden states of each token (AltUp).  config: the decoder's."""
        return getattr(config, "altup_num_inputs", 1) > 1

    def attending_hidden(self, hidden: Tensor) -> Float[Tensor, "batch tokens features"]:
        """The hidden states that a layer's attention reads: the first, if layers pass on several of each token.

        hidden: [batch, tokens, features] or [states, batch, tokens, features].
        """
        return hidden if hidden.ndim == 3 else hidden[0]

    def text_only_hint(self, model: PreTrainedModel, arguments: Mapping[str, Any]) -> str | None:
        """A hint how to make `generate` return text alone, if it would also speak with these arguments; else None."""
        text = arguments.get("return_audio") is False or arguments.get("generation_mode") in ("text", False)
        if text or not getattr(model, "has_talker", False):
            return None
        return "ask for text only: generation_mode='text' (Qwen2.5-Omni), return_audio=False (Qwen3-Omni)"

    def audio_attention(self) -> EncoderAttention | None:
        """The audio encoder's attention, for `Signal.AUDIO_ENCODER`; None if this adapter does not provide it."""
        return None

    def vision_attention(self) -> EncoderAttention | None:
        """The vision encoder's attention, for `Signal.VISION_ENCODER`; None if this adapter does not provide it."""
        return None


def adapter_for(architectures: Collection[str], config: Mapping[Any, Any] | None = None) -> ModelAdapter:
    """A new adapter for a model, found by the names in its configuration's `architectures`.

    config: the contents of config.json, to explain why a model cannot be supported.
    Raises: UnsupportedModel if no adapter knows any of the names.
    """
    for adapter in MODELS.values():
        if adapter.architectures & set(architectures):
            return adapter()
    names = " or ".join(sorted(architectures)) or "(the configuration names none)"
    if reason := token_mixing.of_config(config or {}):
        raise UnsupportedModel(f"{names} cannot be pruned: {reason}", "run it without fastav")
    raise UnsupportedModel(
        f"no adapter knows the architecture {names}",
        f"known models: {', '.join(MODELS)}; docs/adapters.md explains how to write an adapter",
    )


def plan_named(plan: Any, adapter: ModelAdapter) -> Plan:
    """A `Plan` as it is; or, by name, a preset of the model, a JSON file, or a recipe (`fastv`, `fastv@0.25`).

    Behind any of these, `@r=0.25` sets a target of mean retention, `@flops=0.4` and `@kv=0.3` others.
    Raises: UnknownName, PlanError.
    """
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str):
        raise PlanError(
            f"a plan must be a fastav.Plan or a name, got {type(plan).__name__}", "plan='none' prunes nothing"
        )
    presets = ("none", *adapter.presets)
    if plan in presets:
        return adapter.preset(plan)
    if plan.endswith(".json"):
        return Plan.load(plan)
    path, _, suffix = plan.rpartition("@")
    if path.endswith(".json"):
        return Plan.load(path).aiming_at(Target.from_suffix(suffix))
    name, _, suffix = plan.partition("@")
    if name in presets and "=" in suffix:
        return adapter.preset(name).aiming_at(Target.from_suffix(suffix))
    if name not in RECIPES:
        raise unknown_name(f"plan of {adapter.name}", plan, [*presets, *RECIPES])
    return recipe(plan)
