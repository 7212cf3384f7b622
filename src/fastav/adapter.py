"""What a model family must tell: how to load it, what its prompts are made of, and where its decoder is.

A family is a folder `models/<name>/` exporting `<Name>Adapter`; it is found by its name and by
`config.architectures`. Only that folder knows the family's token ids, processor and tensor names.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from os import PathLike
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from fastav import token_mixing
from fastav.compatibility import require_tested
from fastav.errors import FastAVError, MissingTrack, PlanError, UnsupportedModel
from fastav.flops import DecoderShape
from fastav.formatting import plural
from fastav.installation import importable
from fastav.layout import Layout
from fastav.media import Clip
from fastav.plan import Plan
from fastav.presets import NONE
from fastav.recipes import recipe
from fastav.registry import MODELS, RECIPES, unknown_name

require_tested("torch", "transformers")

with importable():  # the first import of transformers' models in most programs, where a broken package shows
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin


class Use(StrEnum):
    """Which tracks of a clip a request shows to the model."""

    AUTO = "auto"
    BOTH = "both"
    VIDEO = "video"
    AUDIO = "audio"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise unknown_name("use of a clip", str(value), cls)


@dataclass(frozen=True, slots=True, init=False)
class Request:
    """One question about one clip.

    clip: a `Clip`, or whatever `Clip.open` opens, such as a path.
    use: `auto` takes whatever tracks the clip has; the others demand theirs.
    Raises: MediaError for a clip that cannot be opened; FastAVError for a question that is no text.
    """

    clip: Clip
    question: str
    use: Use

    def __init__(
        self,
        *,
        clip: Any,
        question: str,
        use: Use | str = Use.AUTO,
    ) -> None:
        for name, value in (("clip", clip_of(clip)), ("question", question_of(question)), ("use", Use(use))):
            object.__setattr__(self, name, value)

    @property
    def shown(self) -> Clip:
        """The clip as it is shown: if both its tracks are, both from the clip's start on (`Clip.aligned`).

        For families that put video and sound together by time. Others take the tracks as they are, and their starts.
        Raises: MissingTrack, UnreadableMedia.
        """
        return self.clip.aligned() if all(self.tracks) else self.clip

    @property
    def tracks(self) -> tuple[bool, bool]:
        """Whether the video and the audio track are shown to the model.

        Raises: MissingTrack if the clip lacks a track that `use` demands.
        """
        video, audio = self.clip.video is not None, self.clip.audio is not None
        wants_video, wants_audio = self.use in (Use.BOTH, Use.VIDEO), self.use in (Use.BOTH, Use.AUDIO)
        if wants_video and not video:
            raise MissingTrack(f"{self.clip.name} has no video track", "ask with use='audio' (--use audio)")
        if wants_audio and not audio:
            raise MissingTrack(f"{self.clip.name} has no audio track", "ask with use='video' (--use video)")
        return (video, audio) if self.use is Use.AUTO else (wants_video, wants_audio)


def clip_of(clip: Any) -> Clip:
    """The clip itself, or what `Clip.open` makes of a path and the like.  Raises: MediaError, FastAVError."""
    if isinstance(clip, Clip):
        return clip
    if not (isinstance(clip, str | PathLike | bytes) or hasattr(clip, "read")):
        found = type(clip).__name__
        raise FastAVError(f"a clip must be a fastav.Clip or a path, got {found}", "fastav.Clip.open, or .from_arrays")
    return Clip.open(clip)


def question_of(question: Any) -> str:
    """The question itself.  Raises: FastAVError if it is no text, or nothing but blanks."""
    if not isinstance(question, str):
        raise FastAVError(f"a question must be a text, got {type(question).__name__}")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise FastAVError("the question is not text: it holds bytes that are not UTF-8") from None
    if not question.strip():
        raise FastAVError("the question is empty", "ask something about the clip")
    return question


def request_of(clip: Any, question: Any, use: Use) -> Request:
    """The request itself, or one of a clip and a question.  Raises: as `Request`."""
    if not isinstance(clip, Request):
        return Request(clip=clip_of(clip), question=question_of(question), use=use)
    if question is not None:
        raise FastAVError("a Request holds its own question, and another one was given", "give one of them")
    return clip


def is_list(value: Any) -> bool:
    """Whether a pipeline is given several of something."""
    return isinstance(value, list | tuple)


def requests_of(clips: Any, questions: Any, use: Use) -> list[Request]:
    """Requests of a list of them, or of clips and questions: lists of one length, or one of them for all.

    A clip that stands for all is opened once.
    Raises: FastAVError for lists of different lengths; as `Request`.
    """
    if not is_list(clips):
        clips = [clips if isinstance(clips, Request) else clip_of(clips)] * len(questions)
    if not is_list(questions):
        questions = [questions] * len(clips)
    if len(clips) != len(questions):
        raise FastAVError(
            f"{plural(len(clips), 'clip')} and {plural(len(questions), 'question')} make no pairs",
            "give one for each",
        )
    return [request_of(clip, question, use) for clip, question in zip(clips, questions, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Arguments of a model's `forward` for a batch of requests (left-padded), and the layout of each row."""

    inputs: Mapping[str, Any]
    layouts: tuple[Layout, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VllmInputs:
    """A request as vLLM takes it: its copy of the family's processor makes the inputs of `prepare` from it.

    text: the conversation, with the family's placeholder where each medium stands. media: by modality, as
    `multi_modal_data`. options: of the processor's call, as `mm_processor_kwargs`.
    """

    text: str
    media: Mapping[str, Any]
    options: Mapping[str, Any]


class AudioAttention(ABC):
    """How much attention a family's audio tokens receive in the last layer of its audio encoder."""

    @abstractmethod
    def modules(self, model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
        """The encoder, called with all sounds of a batch, and the attention of its last layer, called once in there."""

    @abstractmethod
    def received(
        self, attention: nn.Module, sounds: Mapping[str, Any], given: Mapping[str, Any]
    ) -> Float[Tensor, " tokens"]:
        """Of each audio token, in the order of the prompts: the mean over heads and over queries that may see it.

        In float32, pooled as the encoder pools what it says. sounds, given: the arguments by name of the encoder's and
        of the attention's call.
        """


class ModelAdapter(ABC):
    """One model family."""

    name: ClassVar[str]
    architectures: ClassVar[frozenset[str]]
    checkpoint: ClassVar[str]  # hub id of the released weights
    revision: ClassVar[str | None] = None  # of that, if it is not the main one
    presets: ClassVar[Mapping[str, Plan]]
    hears: ClassVar[bool] = True  # whether it takes sound
    packages: ClassVar[tuple[str, ...]] = ()  # that it needs besides transformers
    steps_wait: ClassVar[bool] = (
        True  # whether a decoding step asks the device for values, so that none can be captured
    )
    deepstack_method: ClassVar[str | None] = None  # of the decoder: adds visual features behind early layers
    stacks_hidden_states: ClassVar[bool] = False  # whether layers pass on several hidden states of each token (AltUp)
    cache_limit: ClassVar[str] = ""  # when the model's own code drops its cache during an answer

    def preset(self, name: str) -> Plan:
        """The plan of this name; `none` prunes nothing.  Raises: UnknownName."""
        known = {"none": NONE, **self.presets}
        if name not in known:
            raise unknown_name(f"plan of {self.name}", name, known)
        return known[name]

    @abstractmethod
    def config(self, source: str | None = None) -> PreTrainedConfig:
        """The configuration in a local folder or hub id; of the release, without any download, if None."""

    @abstractmethod
    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Model (in evaluation mode) and processor from a local folder or a hub id.

        options: as `from_pretrained` takes them (`dtype`, `device_map`, `attn_implementation`, ...).
        Raises: CheckpointError if keys are missing, left over, or of another shape.
        """

    @abstractmethod
    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of this configuration whose weights are not loaded."""

    @abstractmethod
    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests."""

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """Decode and sample a request as `prepare` does, for vLLM to tokenize.

        Raises: UnsupportedModel if this family cannot be asked there; as `prepare`.
        """
        raise UnsupportedModel(f"{self.name} has no inputs for vLLM", "use the engine transformers")

    @abstractmethod
    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone."""

    @abstractmethod
    def example(
        self,
        config: PreTrainedConfig,
        *,
        seconds: float | int | None = None,
        audio: int | None = None,
        video: int | None = None,
        text: int,
    ) -> Layout:
        """A typical prompt about a clip of 1280 x 720 with sound, for estimates without media.

        seconds: how long it is (None: a length that is typical of the family). audio, video: other numbers of tokens
        than such a clip has.
        """

    @abstractmethod
    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The decoder's dimensions."""

    def language_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The part that reads the prompt and writes text, where a model has others (a talker); else the model itself.

        `decoder` and `encoders` are asked for this part's.
        """
        return model

    @abstractmethod
    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The module whose `layers` are the decoder layers."""

    @abstractmethod
    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The modules that turn audio and video into embeddings, projectors included (their time is `encode`)."""

    def attending_hidden(self, hidden: Tensor) -> Float[Tensor, "batch tokens features"]:
        """The hidden states that a layer's attention reads, where layers pass on several of each token."""
        return hidden

    def text_only_hint(self, model: PreTrainedModel, arguments: Mapping[str, Any]) -> str | None:
        """How to ask this model for text alone, if `generate` with these arguments would also speak; else None."""
        return None

    def audio_attention(self) -> AudioAttention | None:
        """Where the audio encoder attends, for `Signal.ENCODER`; None where this adapter does not tell."""
        return None


def adapter_for(architectures: Collection[str], config: Mapping[Any, Any] | None = None) -> ModelAdapter:
    """The adapter of a model, by the names in its configuration's `architectures`.

    config: as config.json holds it, to say more about a model that nobody can support.
    Raises: UnsupportedModel if no adapter knows any of them.
    """
    for adapter in MODELS.values():
        if adapter.architectures & set(architectures):
            return adapter()
    named = " or ".join(sorted(architectures)) or "(the configuration names none)"
    if why := token_mixing.of_config(config or {}):
        raise UnsupportedModel(f"{named} cannot be pruned: {why}", "run it without fastav")
    raise UnsupportedModel(
        f"no adapter knows the architecture {named}",
        f"known models: {', '.join(MODELS)}; docs/adapters.md says how to write one",
    )


def plan_named(plan: Any, adapter: ModelAdapter) -> Plan:
    """The plan itself; by name, a preset of the model; the plan in a JSON file; or a recipe, `fastv` or `fastv@0.25`.

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
    if plan.partition("@")[0] not in RECIPES:
        raise unknown_name(f"plan of {adapter.name}", plan, [*presets, *RECIPES])
    return recipe(plan)
