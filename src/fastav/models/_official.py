"""Families that transformers has itself: its configuration, model and processor; here only what they do not tell.

A family says how one request becomes a processor's call. Sampling, batching and loading are alike and stand here.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import transformers
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.video_utils import VideoMetadata

from fastav.adapter import ModelAdapter, Prepared, Request, Use
from fastav.errors import CheckpointError, MediaError, reason_of
from fastav.installation import require_packages
from fastav.layout import Layout
from fastav.media import VideoTrack
from fastav.models._checkpoint import HUB_OPTIONS, read_processor, readable, refuse_differences

CHANNELS_LAST = "channels_last"
"""The layout of every frame, given to processors: their guess is wrong for a frame that is 1 or 3 pixels high."""

OF_TOKENS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})


class Row(NamedTuple):
    """One request: what the processor made of it, and its layout."""

    inputs: Mapping[str, Any]
    layout: Layout


class OfficialAdapter(ModelAdapter):
    """A family that transformers has itself.

    config_class, model_class, processor_class: names in transformers. variants: the first two of checkpoints of another
    `model_type`. release: the arguments of the configuration of the released weights. unused: how the keys of parts of
    a checkpoint begin that are left out. packages: of Python that its processor and model need besides transformers.
    """

    decode_syncs = False
    config_class: ClassVar[str]
    model_class: ClassVar[str]
    processor_class: ClassVar[str]
    variants: ClassVar[Mapping[str, tuple[str, str]]] = {}
    release: ClassVar[Mapping[str, Any]]
    unused: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ("torchvision",)

    def config(self, source: str | None = None) -> PreTrainedConfig:
        """The configuration in a local folder or hub id; of the release, without any download, if None."""
        if source is None:
            return getattr(transformers, self.config_class)(**self.release, architectures=[self.model_class])
        with readable(source):
            return self._classes(source, {})[0].from_pretrained(source)

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Model (in evaluation mode) and processor from a local folder or a hub id.

        Raises: CheckpointError if keys are missing, left over, or of another shape, or files cannot be read;
        InstallationError if a package that the family needs is not installed.
        """
        require_packages(self.name, self.packages, "transformers")
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        with readable(source):
            _, kind = self._classes(source, hub)  # the clearest of errors if there is nothing there
            processor = read_processor(getattr(transformers, self.processor_class), source, hub)
            model, info = kind.from_pretrained(
                source, output_loading_info=True, **{**options, "ignore_mismatched_sizes": True}
            )
        unexpected = [key for key in info["unexpected_keys"] if not key.startswith(self.unused)]
        refuse_differences({**info, "unexpected_keys": unexpected}, source)
        return model.eval(), processor

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of this configuration whose weights are not loaded."""
        _, name = self.variants.get(config.model_type, (self.config_class, self.model_class))
        return getattr(transformers, name)(config)

    def _classes(self, source: str, hub: dict[str, Any]) -> tuple[Any, Any]:
        """The classes of a checkpoint's configuration and model."""
        written, _ = PreTrainedConfig.get_config_dict(source, **hub)
        names = self.variants.get(written.get("model_type", ""), (self.config_class, self.model_class))
        return getattr(transformers, names[0]), getattr(transformers, names[1])

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests.

        Raises: CheckpointError for another model's processor; MissingTrack for a clip without a track that is asked
        for; MediaError if sound is shown to a model that takes none.
        """
        self.require(processor, requests)
        rows = [self._row(processor, request) for request in requests]
        tokenizer: Any = getattr(processor, "tokenizer")  # noqa: B009  (each processor has it, their base does not)
        inputs = collated([row.inputs for row in rows], pad=tokenizer.pad_token_id)
        return Prepared(inputs=inputs, layouts=tuple(row.layout for row in rows))

    def _row(self, processor: Any, request: Request) -> Row:
        try:
            return self.row(processor, request)
        except (ValueError, ArithmeticError) as error:  # the processor's own words for what it does not take
            message = f"{request.clip.name} cannot be shown to {self.name}: {reason_of(error)}"
            raise MediaError(message, "crop it, or ask another model") from error

    def require(self, processor: ProcessorMixin, requests: Sequence[Request]) -> None:
        """Refuse another model's processor, and requests that the family cannot take.

        Raises: CheckpointError, MediaError.
        """
        if type(processor).__name__ != self.processor_class:
            raise CheckpointError(
                f"{self.name} needs a {self.processor_class}, got {type(processor).__name__}", "use the one `load` gave"
            )
        for request in requests:
            if not self.supports_audio and request.use in (Use.BOTH, Use.AUDIO):
                raise no_audio(self)

    @abstractmethod
    def row(self, processor: Any, request: Request) -> Row:
        """The processor's tensors for one request, and its layout."""


def no_audio(adapter: ModelAdapter) -> MediaError:
    """The error for a request that shows sound to a model that takes none."""
    return MediaError(f"{adapter.name} does not hear", "ask with use='video' (--use video)")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """Frames of a video as a processor samples them.

    metadata: as `VideoMetadata` holds it. seconds: when each frame is shown.
    """

    frames: UInt8[np.ndarray, "frames height width 3"]
    metadata: dict[str, Any]
    seconds: Float[np.ndarray, " frames"]

    @property
    def fps(self) -> float:
        """Sampled frames a second."""
        return len(self.frames) * self.metadata["fps"] / self.metadata["total_num_frames"]


def sampled(track: VideoTrack, processor: Any, *, fps: float | int) -> Sampled:
    """The frames that a video processor of transformers picks from a track, decoded.

    A track with fewer frames than a token shows, whose last the processor repeats, or than the processor's settings
    ask for, is given whole.
    fps: frames a second where the processor's own settings name neither a rate nor a number.
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
        picked = (int(i) for i in processor.sample_frames(VideoMetadata(**metadata), fps=rate))
        # some step through the track in fractions of a frame, whose rounding may land one past its end
        indices = [i for i in picked if i < track.frames]
    seconds = np.asarray(track.seconds(indices), np.float64)
    return Sampled(frames=track.read(indices), metadata={**metadata, "frames_indices": indices}, seconds=seconds)


def for_vllm(video: Sampled) -> dict[str, Any]:
    """The metadata with which vLLM takes frames that are sampled already."""
    return {**video.metadata, "video_backend": "opencv", "do_sample_frames": False}


def bounded(processor: Any) -> dict[str, bool]:
    """Arguments of a video processor that bound a video's tokens as its authors do.

    Where the processor's own settings do not say, transformers before 5.22 leaves them unbounded.
    """
    return {"cap_pixels_per_frame": True} if getattr(processor, "cap_pixels_per_frame", False) is None else {}


def collated(rows: Sequence[Mapping[str, Any]], *, pad: int) -> dict[str, Any]:
    """One batch of several prompts' tensors: tokens padded at the left, media one after another.

    What is named in `OF_TOKENS` is a prompt's own, [1, tokens]; other tensors are media, along whose first axis the
    prompts are joined, after their later axes are padded with zeros to the longest. What is no tensor must be alike in
    all rows.
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
        if name in OF_TOKENS:
            filler = pad if name == "input_ids" else 0
            batch[name] = torch.cat([_left_padded(value, width, filler) for value in values])
        else:
            batch[name] = torch.cat(_alike(values))
    return batch


def _left_padded(value: Tensor, width: int, filler: int) -> Tensor:
    return torch.nn.functional.pad(value, (width - value.shape[1], 0), value=filler)


def _alike(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors padded with zeros so that they differ in their first axis only."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        room = [n - have for n, have in zip(shape, value.shape[1:], strict=True)]
        padded.append(
            torch.nn.functional.pad(value, [x for n in reversed(room) for x in (0, n)]) if any(room) else value
        )
    return padded


def rendered(processor: Any, content: Sequence[Mapping[str, str]] | str) -> str:
    """One user's message by the processor's own (or its tokenizer's) chat template, up to where the model answers.

    Raises: CheckpointError if the processor has no template.
    """
    if getattr(processor, "chat_template", None) is None:
        raise CheckpointError(
            "the processor has no chat template", "is chat_template.json missing from the checkpoint?"
        )
    messages = [{"role": "user", "content": content if isinstance(content, str) else list(content)}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def refuse_written_placeholders(question: str, words: Sequence[str]) -> None:
    """Raise MediaError if a question holds a word that stands for media."""
    if placeholders := [word for word in words if word and word in question]:
        raise MediaError(
            f"the question holds {', '.join(placeholders)}, which stands for media", "write it differently"
        )
