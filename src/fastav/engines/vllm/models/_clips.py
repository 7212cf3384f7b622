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
from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]
from vllm.multimodal.inputs import MultiModalFieldConfig  # pyright: ignore[reportMissingImports]
from vllm.multimodal.media import MediaWithBytes  # pyright: ignore[reportMissingImports]
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems  # pyright: ignore[reportMissingImports]
from vllm.multimodal.processing import (  # pyright: ignore[reportMissingImports]
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdateDetails,
)

from fastav.adapter import Request, Use
from fastav.errors import FastAVError
from fastav.media import Clip

KINDS = ("video", "audio")  # ways to show a clip, which are vLLM's modalities
RUN = "run"  # the field that holds the ids which stand for a clip
EMBEDDED = ("video_token_id", "audio_token_id", "blank_token_id")  # in a scheme: ids that encoders give embeddings for
Source = bytes | Path | Clip


def embedded(scheme: Any) -> list[int]:
    """The ids of a clip's run that are not text."""
    return [getattr(scheme, name) for name in EMBEDDED if hasattr(scheme, name)]


@contextmanager
def refused() -> Iterator[None]:
    """Turn our errors into those that vLLM's server answers with 400."""
    try:
        yield
    except FastAVError as error:
        raise VLLMValidationError(str(error)) from error


@contextmanager
def opened(source: Source) -> Iterator[Clip]:
    """The clip, while it is read.  Raises: UnreadableMedia."""
    if isinstance(source, bytes):
        with TemporaryDirectory(prefix="fastav-") as folder:
            path = Path(folder) / "clip"
            path.write_bytes(source)
            yield Clip.open(path)
    else:
        yield source if isinstance(source, Clip) else Clip.open(source)


class Clips(ProcessorBatchItems):
    """The clips of a prompt, not yet decoded; None where a client names one that it sent before."""

    def get_item_for_hash(self, index: int) -> object:
        """By what vLLM knows a clip again: its bytes; a file's name, size and time; a clip in memory never."""
        source = self.data[index]
        if isinstance(source, Path):
            found = source.stat() if source.is_file() else None
            return str(source) if found is None else f"{source.absolute()} {found.st_size} {found.st_mtime_ns}"
        return uuid.uuid4().hex if isinstance(source, Clip) else source


class ClipParser(MultiModalDataParser):
    """Takes `multi_modal_data` as the families' documentation says."""

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {kind: lambda data, kind=kind: _clips(data, kind) for kind in KINDS}


def _clips(data: Any, kind: str) -> Clips | None:
    given = data if isinstance(data, list) else [data]
    return None if data is None else Clips([_source(one) for one in given], kind)


def _source(given: Any) -> Source | None:
    if isinstance(given, MediaWithBytes):
        return given.original_bytes
    if isinstance(given, str | os.PathLike):
        return Path(given)
    if given is None or isinstance(given, bytes | Clip):
        return given
    raise VLLMValidationError(
        f"a clip must be a path, the bytes of a media file or a fastav.media.Clip, got {type(given).__name__}"
    )


class ClipInfo(BaseProcessingInfo):
    """What vLLM asks about a family's clips.  A family says which class its processor is."""

    processor_class: ClassVar[Any]

    @cached_property
    def _processor(self) -> Any:
        model = self.ctx.model_config
        return self.processor_class.from_pretrained(model.model, revision=model.revision or "main")

    def get_hf_processor(self, **_: object) -> Any:
        """Ours, with a tokenizer of its own."""
        return self._processor

    def get_default_tok_params(self) -> Any:
        """As our processors tokenize."""
        return super().get_default_tok_params().with_kwargs(add_special_tokens=False)

    def get_data_parser(self) -> ClipParser:
        """One that keeps clips as they are."""
        return ClipParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """A prompt shows one clip."""
        return dict.fromkeys(KINDS, 1)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """A clip may fill a prompt."""
        return {kind: seq_len for kind in KINDS if mm_counts.get(kind)}

    def mark(self, kind: str) -> int:
        """The id that stands for a clip in a prompt until it is known how many tokens it has."""
        media = self._processor.media
        return media.video_token_id if kind == "video" else media.audio_token_id

    def place(self, kind: str) -> str:
        """The word that stands for a clip in a prompt's text."""
        return self._processor.places[kind].strip()


class ClipDummies(BaseDummyInputsBuilder):
    """A black and silent clip, as long as any that is shown whole: vLLM reckons with the memory that it takes."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """No text: `ClipProcessing.get_dummy_inputs` makes tokens."""
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """One clip, as a prompt has one."""
        seconds = round(getattr(self.info.get_hf_processor().media, "max_time", 2))
        black, silence = np.zeros((8 * seconds, 32, 32, 3), np.uint8), np.zeros(16_000 * seconds, np.float32)
        clip = Clip.from_arrays(frames=black, fps=8, waveform=silence, sample_rate=16_000)
        return {kind: [clip] for kind in KINDS[:1] if mm_counts.get(kind)} or {"audio": [clip]}


class ClipProcessing(BaseMultiModalProcessor):
    """Reads clips as `fastav.pipeline` does.  A family says how."""

    @abstractmethod
    def encoded(self, processor: Any, request: Request, place: str) -> BatchFeature:
        """What the family's processor makes of a clip and a prompt that is nothing but the clip's place."""

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        """A prompt that is one clip."""
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        items = self.info.parse_mm_data(data, validate=False)
        return ProcessorInputs(prompt=[self.info.mark(kind) for kind in data], mm_data_items=items)

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As vLLM's own.  Raises: VLLMValidationError for more than one clip, or one that cannot be shown."""
        if len(inputs.mm_data_items) > 1:
            raise VLLMValidationError("a prompt shows one clip, got a video and a sound (send one file with both)")
        with refused():
            return super().apply(inputs, timing_ctx)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        for kind, clips in mm_items.items():
            return self._features(clips[0], kind, self._use(kind, hf_kwargs))
        return BatchFeature()  # vLLM has kept what the clip became

    def _use(self, kind: str, options: Mapping[str, object]) -> Use:
        """Which tracks are shown.  Raises: UnknownName, VLLMValidationError."""
        said = self.info.ctx.get_merged_mm_kwargs(options)
        if unknown := sorted(set(said) - {"use"}):
            raise VLLMValidationError(f"mm_processor_kwargs can say use, got {', '.join(unknown)}")
        return Use(str(said.get("use", Use.AUTO))) if kind == "video" else Use.AUDIO

    def _features(self, source: Any, kind: str, use: Use) -> BatchFeature:
        """All that a clip becomes, each array as the one element of a batch, and its kind."""
        with opened(source) as clip:
            if kind == "video" and use is Use.AUTO:
                clip.require_video()
            request = Request(clip=clip, question="(none)", use=use)  # the clip alone is asked for
            place = self.info.place("video" if request.tracks[0] else "audio")
            made = dict(self.encoded(self.info.get_hf_processor(), request, place))
        del made["attention_mask"]
        made[RUN] = made.pop("input_ids")[0]
        return BatchFeature({name: value[None] for name, value in made.items()} | {"kind": kind})

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        given = dict(hf_inputs)
        kind = given.pop("kind", KINDS[0])
        return {name: MultiModalFieldConfig.batched(kind, keep_on_cpu=name == RUN) for name in given}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        ids = embedded(self.info.get_hf_processor().media)

        def run(kind: str) -> Any:
            return lambda item: PromptUpdateDetails.select_token_ids(out_mm_kwargs[kind][item][RUN].data.tolist(), ids)

        return [
            PromptReplacement(modality=kind, target=[self.info.mark(kind)], replacement=run(kind)) for kind in mm_items
        ]
