"""From the bytes of a media file to what a model's encoders take, by the family's adapter and processor."""

import os
import uuid
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
from transformers import BatchFeature

from fastav.engines.vllm.compat import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    MediaWithBytes,
    MultiModalDataParser,
    MultiModalFieldConfig,
    ProcessorBatchItems,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdateDetails,
    VLLMValidationError,
)
from fastav.errors import FastAVError
from fastav.media import Clip
from fastav.messages import Kind, Media, Use

KINDS = ("video", "audio")  # ways to show a clip, as vLLM names modalities
CLIP_IDS = "clip_ids"  # the field with the ids of a clip's tokens
EMBEDDED = ("video_token_id", "audio_token_id", "blank_token_id")  # of a scheme: ids whose embeddings encoders compute
Source = bytes | Path | Clip


def embedded_ids(scheme: Any) -> list[int]:
    """The ids among a clip's tokens that are not text."""
    return [getattr(scheme, name) for name in EMBEDDED if hasattr(scheme, name)]


@contextmanager
def as_validation_error() -> Iterator[None]:
    """Turn our errors into those that vLLM's server answers with status 400."""
    try:
        yield
    except FastAVError as error:
        raise VLLMValidationError(str(error)) from error


@contextmanager
def open_clip(source: Source) -> Iterator[Clip]:
    """Open a clip for as long as it is read.  Raises: UnreadableMedia."""
    if isinstance(source, bytes):
        with TemporaryDirectory(prefix="fastav-") as folder:
            path = Path(folder) / "clip"
            path.write_bytes(source)
            yield Clip.open(path)
    else:
        yield source if isinstance(source, Clip) else Clip.open(source)


class Clips(ProcessorBatchItems):
    """The clips of a prompt, not yet decoded; None in place of one that a client sent before and now only names."""

    def get_item_for_hash(self, index: int) -> object:
        """The identity of a clip: its bytes, or a file's path, size and time; a clip in memory is always new."""
        source = self.data[index]
        if isinstance(source, Path):
            stat = source.stat() if source.is_file() else None
            return str(source) if stat is None else f"{source.absolute()} {stat.st_size} {stat.st_mtime_ns}"
        return uuid.uuid4().hex if isinstance(source, Clip) else source


class ClipParser(MultiModalDataParser):
    """Parses `multi_modal_data` as the docstring of `models` describes it."""

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {kind: lambda data, kind=kind: _clips(data, kind) for kind in KINDS}


def _clips(data: Any, kind: str) -> Clips | None:
    items = data if isinstance(data, list) else [data]
    return None if data is None else Clips([_source(item) for item in items], kind)


def _source(item: Any) -> Source | None:
    if isinstance(item, MediaWithBytes):
        return item.original_bytes
    if isinstance(item, str | os.PathLike):
        return Path(item)
    if item is None or isinstance(item, bytes | Clip):
        return item
    raise VLLMValidationError(
        f"a clip must be a path, the bytes of a media file or a fastav.media.Clip, got {type(item).__name__}"
    )


class ClipInfo(BaseProcessingInfo):
    """Properties of a family's clips that vLLM reads.  Subclasses set `processor_class`."""

    processor_class: ClassVar[Any]

    @cached_property
    def _processor(self) -> Any:
        model = self.ctx.model_config
        return self.processor_class.from_pretrained(model.model, revision=model.revision or "main")

    def get_hf_processor(self, **_: object) -> Any:
        """The family's processor, with a tokenizer of its own."""
        return self._processor

    def get_default_tok_params(self) -> Any:
        """vLLM's parameters without special tokens, as our processors tokenize."""
        return super().get_default_tok_params().with_kwargs(add_special_tokens=False)

    def get_data_parser(self) -> ClipParser:
        """A parser that keeps clips undecoded."""
        return ClipParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """One clip per prompt."""
        return dict.fromkeys(KINDS, 1)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """A clip may fill the whole prompt."""
        return {kind: seq_len for kind in KINDS if mm_counts.get(kind)}

    def placeholder_id(self, kind: str) -> int:
        """The id in place of a clip until the number of its tokens is known."""
        media = self._processor.media
        return media.video_token_id if kind == "video" else media.audio_token_id

    def placeholder(self, kind: str) -> str:
        """The word in place of a clip in a prompt's text."""
        return self._processor.places[kind].strip()


class ClipDummies(BaseDummyInputsBuilder):
    """A black and silent clip of the greatest length that is not shortened, with which vLLM profiles memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Nothing: `ClipProcessing.get_dummy_inputs` makes token ids."""
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """One clip."""
        seconds = round(getattr(self.info.get_hf_processor().media, "max_time", 2))
        black, silence = np.zeros((8 * seconds, 32, 32, 3), np.uint8), np.zeros(16_000 * seconds, np.float32)
        clip = Clip.from_arrays(frames=black, fps=8, waveform=silence, sample_rate=16_000)
        return {kind: [clip] for kind in KINDS[:1] if mm_counts.get(kind)} or {"audio": [clip]}


class ClipProcessing(BaseMultiModalProcessor):
    """Reads clips as `fastav.pipeline` does.  Subclasses implement `encode`."""

    @abstractmethod
    def encode(self, processor: Any, media: Media, placeholder: str) -> BatchFeature:
        """The features of a clip and the ids of a prompt that is only its placeholder, by the family's processor."""

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        """A prompt that is one clip."""
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        items = self.info.parse_mm_data(data, validate=False)
        return ProcessorInputs(prompt=[self.info.placeholder_id(kind) for kind in data], mm_data_items=items)

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a prompt.  Raises: VLLMValidationError for more than one clip, or one that cannot be read."""
        if len(inputs.mm_data_items) > 1:
            raise VLLMValidationError("a prompt takes one clip, got a video and a sound (send one file with both)")
        with as_validation_error():
            return super().apply(inputs, timing_ctx)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        for kind, clips in mm_items.items():
            return self._features(clips[0], kind, self._use(kind, hf_kwargs))
        return BatchFeature()  # vLLM has cached the clip's features

    def _use(self, kind: str, options: Mapping[str, object]) -> Use:
        """The tracks that are used.  Raises: UnknownName, VLLMValidationError."""
        merged = self.info.ctx.get_merged_mm_kwargs(options)
        if unknown := sorted(set(merged) - {"use"}):
            raise VLLMValidationError(f"mm_processor_kwargs may have the key use, got {', '.join(unknown)}")
        return Use(str(merged.get("use", Use.AUTO))) if kind == "video" else Use.AUDIO

    def _features(self, source: Any, kind: str, use: Use) -> BatchFeature:
        """The features of a clip, each as a batch of one, and its kind."""
        with open_clip(source) as clip:
            if kind == "video" and use is Use.AUTO:
                clip.require_video()
            media = Media(kind=Kind.VIDEO if kind == "video" else Kind.AUDIO, clip=clip, use=use)
            placeholder = self.info.placeholder("video" if media.tracks[0] else "audio")
            features = dict(self.encode(self.info.get_hf_processor(), media, placeholder))
        del features["attention_mask"]
        features[CLIP_IDS] = features.pop("input_ids")[0]
        return BatchFeature({name: value[None] for name, value in features.items()} | {"kind": kind})

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        features = dict(hf_inputs)
        kind = features.pop("kind", KINDS[0])
        return {name: MultiModalFieldConfig.batched(kind, keep_on_cpu=name == CLIP_IDS) for name in features}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        embedded = embedded_ids(self.info.get_hf_processor().media)

        def clip_ids(kind: str) -> Any:
            def select(item: int) -> Any:
                return PromptUpdateDetails.select_token_ids(out_mm_kwargs[kind][item][CLIP_IDS].data.tolist(), embedded)

            return select

        return [
            PromptReplacement(modality=kind, target=[self.info.placeholder_id(kind)], replacement=clip_ids(kind))
            for kind in mm_items
        ]
