"""The base of the three families that transformers does not have: VideoLLaMA2, video-SALMONN 2 and video-SALMONN 2+.

Here is what their adapters share; `_native_configuration`, `_native_modeling` and `_native_processing` hold the rest.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from fastav.adapter import ModelAdapter, Prepared, PreparedTurn, Transcript
from fastav.errors import CheckpointError
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.models._adapters import layout_from_masks, prompt_ids, qwen2_shape, with_seconds
from fastav.models._boxes import Boxes
from fastav.models._checkpoint import load, readable
from fastav.models._conversations import only_clip
from fastav.request import Request


def register(config: Any, base: Any, whole: Any, processor: Any) -> None:
    """Make the four classes of a family known to transformers' Auto classes.  base: the model without its head."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, base, exist_ok=True)
    AutoModelForImageTextToText.register(config, whole, exist_ok=True)
    AutoModelForMultimodalLM.register(config, whole, exist_ok=True)
    AutoProcessor.register(config, processor, exist_ok=True)


class NativeAdapter(ModelAdapter):
    """A family whose configuration, model and processor are fastav's own.

    config_class, model_class, processor_class: its classes. original: the architecture that checkpoints of the original
    name. encoder_names: submodules of the model.
    """

    decode_syncs = False
    supports_images = False
    config_class: ClassVar[Any]
    model_class: ClassVar[Any]
    processor_class: ClassVar[Any]
    original: ClassVar[str]
    encoder_names: ClassVar[tuple[str, ...]]

    def interleaves(self, scheme: Any) -> bool:
        """Whether audio tokens stand between frames, so that each has the index of the frame before it."""
        return True

    @abstractmethod
    def step_boxes(self, scheme: Any, inputs: Mapping[str, Any]) -> Iterator[Boxes]:
        """Of each video of a batch: the boxes of the tokens of one step in time; ends early if sizes are unknown."""

    @abstractmethod
    def silence(self, scheme: Any, inputs: Mapping[str, Any]) -> Bool[np.ndarray, "sounds tokens"]:
        """Which tokens of each sound (or piece of one) of a batch are padding; no sounds if that is unknown."""

    @abstractmethod
    def starts(
        self, scheme: Any, inputs: Mapping[str, Any], clips: Sequence[Mapping[str, Any]], layouts: Sequence[Layout]
    ) -> Iterator[tuple[Any, Any]]:
        """Of each row: the seconds at which its video tokens and its audio tokens start.  clips: as `read` gives."""

    def config(self, source: str | None = None) -> Any:
        """The configuration in a local folder or hub id; of the release, without any download, if None."""
        if source is None:
            return self.config_class(architectures=[self.original])
        with readable(source):
            return self.config_class.from_pretrained(source)

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Model (in evaluation mode) and processor from a local folder or a hub id.

        Raises: CheckpointError if keys are missing, left over, or of another shape, or files cannot be read.
        """
        return load(source, options, config=self.config_class, processor=self.processor_class, model=self.model_class)

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of this configuration whose weights are not loaded."""
        self.scheme_of(config)
        return self.model_class(config)

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests.

        Raises: CheckpointError for another model's processor; MissingTrack for a clip without a track that it needs.
        """
        known: Any = processor
        if not isinstance(known, self.processor_class):
            wanted, given = self.processor_class.__name__, type(known).__name__
            raise CheckpointError(
                f"{self.name} needs a {wanted}, got {given}", "use the processor that `load` returned"
            )
        clips = [_read(known, request) for request in requests]
        return self._prepared(known, [known.render(request) for request in requests], clips)

    def prepare_turn(self, processor: ProcessorMixin, request: Request, earlier: Transcript) -> PreparedTurn:
        """Decode, sample and tokenize the new messages of a conversation, which has one clip."""
        known: Any = processor
        clip = _read(known, request)
        transcript, added = known.transcript(request, earlier)
        prepared = self._prepared(known, [added], [clip])
        return PreparedTurn(inputs=prepared.inputs, layout=prepared.layouts[0], transcript=transcript)

    def _prepared(self, processor: Any, prompts: Sequence[str], clips: Sequence[Mapping[str, Any] | None]) -> Prepared:
        """The inputs of rendered prompts and the clips that they show, as `read` gives them."""
        inputs = dict(processor(list(prompts), **processor.media_arguments(clips)))
        layouts = self._layouts(processor.media, inputs)
        with_clip = [(clip, layout) for clip, layout in zip(clips, layouts, strict=True) if clip is not None]
        starts = self.starts(processor.media, inputs, *zip(*with_clip, strict=True)) if with_clip else iter(())
        return Prepared(
            inputs=inputs,
            layouts=tuple(
                layout if clip is None else _timed(layout, next(starts))
                for clip, layout in zip(clips, layouts, strict=True)
            ),
        )

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        return self._layouts(self.scheme_of(config), inputs)

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the Qwen2 or Qwen2.5 decoder."""
        return qwen2_shape(config)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The Qwen2 or Qwen2.5 decoder."""
        return model.get_decoder()

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The submodules that `encoder_names` lists: encoders and what projects their output to the decoder."""
        return tuple(model.get_submodule(name) for name in self.encoder_names)

    def scheme_of(self, config: PreTrainedConfig) -> Any:
        """How a clip becomes tokens.  Raises: CheckpointError for another family's configuration."""
        known: Any = config
        if not isinstance(known, self.config_class):
            raise CheckpointError(f"{self.name} needs a {self.config_class.__name__}, got {type(known).__name__}")
        return known.scheme

    def _layouts(self, scheme: Any, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        steps, silence = self.step_boxes(scheme, inputs), self.silence(scheme, inputs)
        sounds, size = iter(silence), silence.shape[1]
        layouts = []
        for ids in prompt_ids(inputs):
            video, audio = ids == scheme.video_token_id, ids == scheme.audio_token_id
            frame, padding = np.full(len(ids), -1), np.zeros(len(ids), bool)
            box = np.full((len(ids), 4), np.nan, np.float32)
            if (step := next(steps, None) if video.any() else None) is not None:
                token = np.cumsum(video) - 1
                shown = (video | audio if self.interleaves(scheme) else video) & (token >= 0)
                frame = np.where(shown, token // len(step) * scheme.temporal, -1)
                box[video] = step[token[video] % len(step)]
            count, rest = divmod(int(audio.sum()), size)
            known = list(islice(sounds, count))
            if count and not rest and len(known) == count:
                padding[audio] = np.concatenate(known)
            layouts.append(layout_from_masks(video, audio, frame=frame, padding=padding, box=box))
        return tuple(layouts)


def _read(processor: Any, request: Request) -> Mapping[str, Any] | None:
    """The clip of a request as its processor reads it; None if it has none."""
    media = only_clip(request)
    return None if media is None else processor.read(media)


def _timed(layout: Layout, starts: tuple[Any, Any]) -> Layout:
    second = np.array(layout.second)
    second[layout.modality == Modality.VIDEO], second[layout.modality == Modality.AUDIO] = starts
    return with_seconds(layout, second)


def repeated(starts: Any, tokens: int) -> np.ndarray:
    """The seconds at which `tokens` tokens start, of which each start has as many."""
    return np.repeat(np.asarray(starts, np.float64), tokens // max(1, len(starts)))
