"""The base of families whose configuration, model and processor are transformers' own classes.

A family turns one request into a call of its processor. Sampling, batching and loading are shared and defined here.
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
"""The axis order of frames, which processors infer wrongly for a frame that is 1 or 3 pixels high."""

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
        try:
            return self.prepare_request(processor, request)
        except (ValueError, ArithmeticError) as error:  # from the processor, for a clip that it rejects
            message = f"{self.name} cannot process {request.clip.name}: {reason_of(error)}"
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
        for request in requests:
            if not self.supports_audio and request.use in (Use.BOTH, Use.AUDIO):
                raise no_audio(self)

    @abstractmethod
    def prepare_request(self, processor: Any, request: Request) -> PreparedRequest:
        """The processor's tensors for one request, and its layout."""


def no_audio(adapter: ModelAdapter) -> MediaError:
    """The error for a request that requires audio from a model that takes none."""
    return MediaError(f"{adapter.name} does not take audio", "ask with use='video' (--use video)")


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


def render_chat(processor: Any, content: Sequence[Mapping[str, str]] | str) -> str:
    """One user message, rendered by the chat template of the processor or tokenizer, up to the start of the answer.

    Raises: CheckpointError if it has no template.
    """
    if getattr(processor, "chat_template", None) is None:
        raise CheckpointError(
            "the processor has no chat template", "is chat_template.json missing from the checkpoint?"
        )
    messages = [{"role": "user", "content": content if isinstance(content, str) else list(content)}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def refuse_placeholders(question: str, placeholders: Sequence[str]) -> None:
    """Raise MediaError if a question contains a placeholder for media."""
    if matches := [word for word in placeholders if word and word in question]:
        raise MediaError(f"the question contains {', '.join(matches)}, which stands for media", "write it differently")
