"""The base of families whose configuration, model and processor are transformers' own classes.

A family says how it samples a medium and calls its processor. Templates, layouts, batching and loading are shared and
defined here.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int, UInt8
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.video_utils import VideoMetadata

from fastav.adapter import ModelAdapter, Prepared, PreparedTurn, Transcript
from fastav.errors import CheckpointError, FastAVError, MediaError, reason_of
from fastav.installation import require_packages
from fastav.layout import Layout, Modality
from fastav.media import VideoTrack
from fastav.messages import Kind, Media, Use
from fastav.models._adapters import with_seconds
from fastav.models._checkpoint import HUB_OPTIONS, read_processor, readable, refuse_differences
from fastav.models._grids import MediaTokens
from fastav.models._pieces import Pieces, Sample
from fastav.request import Request

CHANNELS_LAST = "channels_last"
"""The axis order of frames, which processors infer wrongly for a frame that is 1 or 3 pixels high."""

VIDEO_FRAMES = "num_frames_per_video"
"""The input with the number of sampled frames of each video."""

PICTURE_SIZES = "picture_sizes"
"""The input with the height and width of each image before the processor resizes it."""

TOKEN_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
"""The inputs that have one value per prompt token, [1, tokens]."""


class PreparedRequest(NamedTuple):
    """The processor's tensors for one request, and its layout."""

    inputs: Mapping[str, Any]
    layout: Layout


class OfficialAdapter(ModelAdapter):
    """The base class of families that transformers implements.

    config_class, model_class, processor_class: class names in transformers. variants: the configuration and model class
    of checkpoints of another `model_type`. release: arguments of the released model's configuration. unused_prefixes:
    prefixes of checkpoint keys that are not loaded. packages: Python packages that the processor and the model need
    besides transformers.
    """

    decode_syncs = False
    config_class: ClassVar[str]
    model_class: ClassVar[str]
    processor_class: ClassVar[str]
    variants: ClassVar[Mapping[str, tuple[str, str]]] = {}
    release: ClassVar[Mapping[str, Any]]
    unused_prefixes: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ("torchvision",)

    def config(self, source: str | None = None) -> PreTrainedConfig:
        """The configuration in a local folder or hub id; None for the released model's, without any download."""
        if source is None:
            return getattr(transformers, self.config_class)(**self.release, architectures=[self.model_class])
        with readable(source):
            return self._classes(source, {})[0].from_pretrained(source)

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Model (in evaluation mode) and processor from a local folder or a hub id.

        Raises: CheckpointError if keys are missing, unexpected, or of another shape, or files cannot be read;
        InstallationError if a package that the family needs is not installed.
        """
        require_packages(self.name, self.packages, "transformers")
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        with readable(source):
            _, model_class = self._classes(source, hub)  # first: its error is clearest if there is no checkpoint
            processor = read_processor(getattr(transformers, self.processor_class), source, hub)
            model, info = model_class.from_pretrained(
                source, output_loading_info=True, **{**options, "ignore_mismatched_sizes": True}
            )
        unexpected = [key for key in info["unexpected_keys"] if not key.startswith(self.unused_prefixes)]
        refuse_differences({**info, "unexpected_keys": unexpected}, source)
        return model.eval(), processor

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of this configuration, without loading weights."""
        _, class_name = self.variants.get(config.model_type, (self.config_class, self.model_class))
        return getattr(transformers, class_name)(config)

    def _classes(self, source: str, hub: dict[str, Any]) -> tuple[Any, Any]:
        """The configuration and model class of a checkpoint."""
        values, _ = PreTrainedConfig.get_config_dict(source, **hub)
        names = self.variants.get(values.get("model_type", ""), (self.config_class, self.model_class))
        return getattr(transformers, names[0]), getattr(transformers, names[1])

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests.

        Raises: CheckpointError for another model's processor; MissingTrack for a clip without a track that its request
        requires; MediaError if a request requires audio and the model takes none, or the processor rejects a clip.
        """
        self.check_requests(processor, requests)
        prepared = [self._prepare_request(processor, request) for request in requests]
        tokenizer: Any = getattr(processor, "tokenizer")  # noqa: B009  (every processor has it, their base class does not)
        inputs = collate([one.inputs for one in prepared], pad=tokenizer.pad_token_id)
        return Prepared(inputs=inputs, layouts=tuple(one.layout for one in prepared))

    def _prepare_request(self, processor: Any, request: Request) -> PreparedRequest:
        with self._as_media_error(request):
            return self.prepare_request(processor, request)

    @contextmanager
    def _as_media_error(self, request: Request) -> Iterator[None]:
        """Raise errors of the processor, for a clip that it rejects, as MediaError."""
        try:
            yield
        except (ValueError, ArithmeticError) as error:
            names = ", ".join(media.name for media in request.media) or "this text"
            message = f"{self.name} cannot process {names}: {reason_of(error)}"
            raise MediaError(message, "crop the clip, or use another model") from error

    def check_requests(self, processor: ProcessorMixin, requests: Sequence[Request]) -> None:
        """Reject another model's processor, and requests for audio if the model takes none.

        Raises: CheckpointError, MediaError.
        """
        if type(processor).__name__ != self.processor_class:
            raise CheckpointError(
                f"{self.name} needs a {self.processor_class}, got {type(processor).__name__}",
                "use the processor that `load` returned",
            )
        for media in (media for request in requests for media in request.media):
            if not self.supports_audio and (media.kind is Kind.AUDIO or media.use in (Use.BOTH, Use.AUDIO)):
                raise no_audio(self, media)

    def prepare_request(self, processor: Any, request: Request) -> PreparedRequest:
        """The processor's tensors for one request, and its layout."""
        turn = self._prepare_turn(processor, request, Transcript())
        return PreparedRequest(turn.inputs, turn.layout)

    def prepare_turn(self, processor: ProcessorMixin, request: Request, earlier: Transcript) -> PreparedTurn:
        """Decode, sample and tokenize the new messages of a conversation.  earlier: up to its last answer.

        Raises: FastAVError if the chat template renders earlier messages in another way than before; otherwise as
        `prepare`.
        """
        self.check_requests(processor, [request])
        with self._as_media_error(request):
            return self._prepare_turn(processor, request, earlier)

    def _prepare_turn(self, processor: Any, request: Request, earlier: Transcript) -> PreparedTurn:
        samples = [self.sample(processor, media) for media in request.media]
        transcript, added = self.transcript(processor, request, samples, earlier)
        inputs = self.process(processor, added, samples)
        sizes = {
            VIDEO_FRAMES: [len(video.frames) for sample in samples for video in sample.videos],
            PICTURE_SIZES: [image.shape[:2] for sample in samples for image in sample.images],
        }
        (pieces,) = self.pieces(self.media_tokens(processor), {**inputs, **sizes})
        return PreparedTurn(inputs=inputs, layout=self._with_seconds(pieces, samples), transcript=transcript)

    def transcript(
        self, processor: Any, request: Request, samples: Sequence[Sample], earlier: Transcript
    ) -> tuple[Transcript, str]:
        """The conversation with new messages, and the text that they add, with the family's placeholders for media.

        Raises: MediaError for a text that contains such a placeholder; otherwise as `render_chat`.
        """
        refuse_placeholders(request, self.placeholders(processor))
        parts = {id(media): sample.parts for media, sample in zip(request.media, samples, strict=True)}
        new = [message.to_dict(lambda media: parts[id(media)]) for message in request.messages]
        tools = request.tools or earlier.tools
        return replace(earlier, tools=tools).continued(new, lambda messages: self.render(processor, messages, tools))

    def render(self, processor: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        """Messages with stand-ins for media, rendered by the chat template.  Raises: as `render_chat`."""
        return render_chat(processor, messages, tools)

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown.

        A clip's video and sound count as one item where the tokens do not show otherwise.
        """
        return tuple(pieces.layout() for pieces in self.pieces(self.config_tokens(config), inputs))

    def _with_seconds(self, pieces: Pieces, samples: Sequence[Sample]) -> Layout:
        """The layout of a request, with seconds."""
        layout = pieces.layout(samples)
        second, audio = np.array(layout.second), layout.modality == Modality.AUDIO
        sound, index = pieces.sound_numbers(layout)
        second[audio] = self.audio_seconds(sound[audio], index[audio])
        for number, sample in enumerate(samples):
            of_item = layout.item == number
            shown = of_item & ~audio & (layout.frame >= 0)
            if len(sample.seconds):
                second[shown] = sample.seconds[layout.frame[shown]]
            second[of_item & audio] += sample.start
        return with_seconds(layout, second)

    @abstractmethod
    def sample(self, processor: Any, media: Media) -> Sample:
        """A medium, decoded and sampled.  Raises: MediaError for a kind that the family does not take."""

    @abstractmethod
    def process(self, processor: Any, text: str, samples: Sequence[Sample]) -> dict[str, Any]:
        """The processor's tensors for a rendered conversation and its media."""

    @abstractmethod
    def placeholders(self, processor: Any) -> Sequence[str]:
        """The words that stand for media, which no text may contain."""

    @abstractmethod
    def media_tokens(self, processor: Any) -> MediaTokens:
        """The ids of media tokens, from the processor."""

    @abstractmethod
    def config_tokens(self, config: Any) -> MediaTokens:
        """The ids of media tokens, from the model's configuration."""

    @abstractmethod
    def pieces(self, media_tokens: MediaTokens, inputs: Mapping[str, Any]) -> Iterator[Pieces]:
        """The media tokens of each prompt of a batch, from the arguments of `forward` alone.

        inputs: may also have `VIDEO_FRAMES`, the number of sampled frames of each video, and `PICTURE_SIZES`, the
        height and width of each image.
        """

    def audio_seconds(
        self, sound: Int[np.ndarray, " tokens"], index: Int[np.ndarray, " tokens"]
    ) -> Float[np.ndarray, " tokens"]:
        """Start of audio tokens in their track, in seconds; NaN, which is unknown, unless a family overrides this.

        sound: number of each token's sound among those that the track was cut into. index: its own number in it.
        """
        return np.full(len(index), np.nan)


def no_audio(adapter: ModelAdapter, media: Media | None = None) -> MediaError:
    """The error for a request that requires audio from a model that takes none."""
    place = f"{media.place}: " if media is not None and media.place else ""
    return MediaError(f"{place}{adapter.name} does not take audio", "ask with use='video' (--use video)")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledVideo:
    """The frames that a processor samples from a video.

    metadata: the fields of `VideoMetadata`. seconds: start of each frame.
    """

    frames: UInt8[np.ndarray, "frames height width 3"]
    metadata: dict[str, Any]
    seconds: Float[np.ndarray, " frames"]

    @property
    def fps(self) -> float:
        """Sampled frames per second."""
        return len(self.frames) * self.metadata["fps"] / self.metadata["total_num_frames"]


def sample_video(track: VideoTrack, processor: Any, *, fps: float | int) -> SampledVideo:
    """The frames that a video processor of transformers samples from a track, decoded.

    All frames are taken if the track has fewer than one token covers (the processor then repeats the last one), or
    fewer than the processor's settings require.
    fps: frames per second if the processor's settings define neither a rate nor a number of frames.
    """
    metadata = {
        "total_num_frames": track.frames,
        "fps": track.fps,
        "duration": track.frames / track.fps,
        "width": track.width,
        "height": track.height,
    }
    rate = fps if processor.fps is None and processor.num_frames is None else None
    if track.frames < max(getattr(processor, "temporal_patch_size", 1), processor.num_frames or 1):
        indices = list(range(track.frames))
    else:
        candidates = (int(i) for i in processor.sample_frames(VideoMetadata(**metadata), fps=rate))
        # some processors step by fractions of a frame, and rounding can give the index after the last frame
        indices = [i for i in candidates if i < track.frames]
    seconds = np.asarray(track.seconds(indices), np.float64)
    return SampledVideo(frames=track.read(indices), metadata={**metadata, "frames_indices": indices}, seconds=seconds)


def vllm_metadata(video: SampledVideo) -> dict[str, Any]:
    """The metadata that vLLM needs to take frames that are already sampled."""
    return {**video.metadata, "video_backend": "opencv", "do_sample_frames": False}


def vllm_media(**media: Sequence[Any]) -> dict[str, Any]:
    """Media for vLLM's `multi_modal_data`: by modality, the only medium, or a list of several."""
    return {name: values[0] if len(values) == 1 else list(values) for name, values in media.items() if values}


def pixel_cap(processor: Any) -> dict[str, bool]:
    """The argument of a video processor that limits a video's tokens as its authors do.

    Without it, transformers before 5.22 does not limit them if the processor's settings do not define the limit.
    """
    return {"cap_pixels_per_frame": True} if getattr(processor, "cap_pixels_per_frame", False) is None else {}


def collate(rows: Sequence[Mapping[str, Any]], *, pad: int) -> dict[str, Any]:
    """The tensors of several prompts as one batch: tokens left-padded, media concatenated.

    Inputs in `TOKEN_INPUTS` have shape [1, tokens] per prompt. Other tensors are media: they are concatenated along
    their first axis, after their other axes are padded with zeros to the longest. Inputs that are not tensors must be
    equal in all prompts.
    """
    if len(rows) == 1:
        return dict(rows[0])
    width = max(row["input_ids"].shape[1] for row in rows)
    names = dict.fromkeys(name for row in rows for name in row)
    batch: dict[str, Any] = {}
    for name in names:
        values = [row[name] for row in rows if name in row]
        if not isinstance(values[0], Tensor):
            batch[name] = values[0]
            continue
        if name in TOKEN_INPUTS:
            filler = pad if name == "input_ids" else 0
            batch[name] = torch.cat([_pad_left(value, width, filler) for value in values])
        else:
            batch[name] = torch.cat(_pad_to_longest(values))
    return batch


def _pad_left(value: Tensor, width: int, filler: int) -> Tensor:
    return torch.nn.functional.pad(value, (width - value.shape[1], 0), value=filler)


def _pad_to_longest(values: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, padded with zeros to the same shape in all axes but the first."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [n - size for n, size in zip(shape, value.shape[1:], strict=True)]
        padded.append(
            torch.nn.functional.pad(value, [x for n in reversed(missing) for x in (0, n)]) if any(missing) else value
        )
    return padded


def concatenate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tensors of parts of one prompt as those of the prompt: tokens in a row, media as in `collate`."""
    if len(rows) == 1:
        return dict(rows[0])
    names = dict.fromkeys(name for row in rows for name in row)
    prompt: dict[str, Any] = {}
    for name in names:
        values = [row[name] for row in rows if name in row]
        if not isinstance(values[0], Tensor):
            prompt[name] = values[0]
        else:
            prompt[name] = torch.cat(values, 1) if name in TOKEN_INPUTS else torch.cat(_pad_to_longest(values))
    return prompt


def render_chat(processor: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """Messages, rendered by the chat template of the processor or tokenizer, up to the start of the answer.

    Raises: CheckpointError if it has no template; FastAVError if the template takes no tools, or raises an error.
    """
    template: Any = getattr(processor, "chat_template", None)
    if template is None:
        raise CheckpointError(
            "the processor has no chat template", "is chat_template.json missing from the checkpoint?"
        )
    sources = template.values() if isinstance(template, Mapping) else [template]
    if tools and not any("tools" in source for source in sources):
        raise FastAVError("this model's chat template takes no tools", "describe them in a message")
    options = {"tools": list(tools)} if tools else {}
    try:
        return processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **options)
    except (TemplateError, TypeError) as error:
        raise FastAVError(
            f"the chat template rejects these messages: {reason_of(error)}", "see the model's card for its roles"
        ) from error


def refuse_placeholders(request: Request, placeholders: Sequence[str]) -> None:
    """Raise MediaError if a text of a request contains a placeholder for media."""
    if matches := [word for word in placeholders if word and word in request.text]:
        what = "the question contains" if len(request.messages) == 1 else "a message contains"
        raise MediaError(f"{what} {', '.join(matches)}, which stands for media", "write it differently")
