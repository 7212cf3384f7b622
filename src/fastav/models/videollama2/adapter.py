"""What the rest of fastav must know about VideoLLaMA2.1-7B-AV."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import AudioAttention, ModelAdapter, Prepared, Request, VllmInputs
from fastav.errors import CheckpointError
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.models._adapters import host, of_places, prompts_of, qwen2_shape, with_seconds
from fastav.models._checkpoint import load, readable
from fastav.models._prompts import shown_whole
from fastav.models.videollama2.beats import Beats, BeatsAttention
from fastav.models.videollama2.configuration import VideoLlama2Config
from fastav.models.videollama2.modeling import VideoLlama2ForConditionalGeneration
from fastav.models.videollama2.processing import VideoLlama2Processor
from fastav.models.videollama2.scheme import MERGE, RATE, SHIFT, Scheme
from fastav.plan import Keep, Plan, Tokens
from fastav.presets import fastav, plus, trim

ORIGINAL = "Videollama2Qwen2ForCausalLM"


class VideoLlama2Adapter(ModelAdapter):
    """VideoLLaMA2.1-7B-AV.

    Video and audio: the soundtrack is heard in eight pieces (`clip_bounds`). Audio alone, of whatever file: as the
    original hears sound files, that is the first channel's first 30 s at its own rate (it cannot open video files so).
    """

    name = "videollama2"
    architectures = frozenset({ORIGINAL, "VideoLlama2ForConditionalGeneration"})
    checkpoint = "DAMO-NLP-SG/VideoLLaMA2.1-7B-AV"
    steps_wait = False
    presets: ClassVar[Mapping[str, Plan]] = {
        "fastav": fastav(Keep(audio=Tokens(10))),
        "fastav-plus": plus(),
        "fastav-trim": trim(),
    }
    prefix: ClassVar[int] = 14  # tokens before the clip: the system message and the start of the user's

    def config(self, source: str | None = None) -> VideoLlama2Config:
        """The configuration in a local folder or hub id; of the release, without any download, if None."""
        if source is None:
            return VideoLlama2Config(architectures=[ORIGINAL])
        with readable(source):
            return VideoLlama2Config.from_pretrained(source)

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Model (in evaluation mode) and processor from a local folder or a hub id.

        Raises: CheckpointError if keys are missing, left over, or of another shape, or files cannot be read.
        """
        return load(
            source,
            options,
            config=VideoLlama2Config,
            processor=VideoLlama2Processor,
            model=VideoLlama2ForConditionalGeneration,
        )

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of this configuration whose weights are not loaded."""
        _scheme(config)
        known: Any = config
        return VideoLlama2ForConditionalGeneration(known)

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests.

        Raises: CheckpointError for another model's processor; MissingTrack for a clip with neither track.
        """
        if not isinstance(processor, VideoLlama2Processor):
            raise CheckpointError(
                f"{self.name} needs a VideoLlama2Processor, got {type(processor).__name__}", "use the one `load` gave"
            )
        clips = [processor.read(request) for request in requests]
        inputs = processor(
            [
                processor.prompt(request.question, video=clip["video"] is not None, audio=clip["audio"] is not None)
                for request, clip in zip(requests, clips, strict=True)
            ],
            **processor.media_arguments(clips),
        )
        layouts = _layouts(processor.media, inputs)
        return Prepared(
            inputs=dict(inputs),
            layouts=tuple(_timed(layout, clip) for layout, clip in zip(layouts, clips, strict=True)),
        )

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """What vLLM is given for a request: the clip as it is."""
        return shown_whole(processor, request)

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        return tuple(_layouts(_scheme(config), inputs))

    def example(
        self,
        config: PreTrainedConfig,
        *,
        seconds: float | int | None = None,
        audio: int | None = None,
        video: int | None = None,
        text: int,
    ) -> Layout:
        """A typical prompt: some text, video, audio, the rest of the text.

        A clip of any length gives as many tokens; of its audio, 16 s are sound.
        """
        scheme = _scheme(config)
        sound = np.arange(scheme.fbank_rows) < scheme.audio_clips * scheme.clip_seconds * RATE // SHIFT
        padding = ~_heard(scheme, sound) if audio is None else None
        frames = scheme.video_tokens(min(scheme.num_frames, scheme.most_frames)) if video is None else video
        before = min(self.prefix, text)
        return Layout.join(
            [
                Layout.of(Modality.TEXT, before),
                Layout.of(Modality.VIDEO, frames, frame=np.arange(frames) // scheme.pair_tokens * MERGE),
                Layout.of(Modality.AUDIO, scheme.audio_tokens if audio is None else audio, padding=padding),
                Layout.of(Modality.TEXT, text - before),
            ]
        )

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the Qwen2 decoder."""
        return qwen2_shape(config)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """Qwen2, which is the model itself without its head."""
        return model.get_decoder()

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """SigLIP, the STC connector, BEATs and the audio projector."""
        names = ("vision_tower", "mm_projector", "audio_tower", "mm_projector_a")
        return tuple(self.decoder(model).get_submodule(name) for name in names)

    def audio_attention(self) -> AudioAttention:
        """BEATs', each of whose tokens is one of the prompt's."""
        return BeatsLastAttention()


class BeatsLastAttention(AudioAttention):
    """Of BEATs' last layer: every token of a sound, padding included, sees all."""

    def modules(self, model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
        """BEATs, and the attention of its last layer."""
        tower = model.get_decoder().get_submodule("audio_tower")
        assert isinstance(tower, Beats)
        return tower, tower.encoder.layers[-1].get_submodule("self_attn")

    def received(
        self, attention: nn.Module, sounds: Mapping[str, Any], given: Mapping[str, Any]
    ) -> Float[Tensor, " tokens"]:
        """Of each audio token: the mean over heads and over all tokens of its sound."""
        assert isinstance(attention, BeatsAttention)
        return attention.received(given["hidden"], given["position_bias"]).flatten()


def _scheme(config: PreTrainedConfig) -> Scheme:
    if not isinstance(config, VideoLlama2Config):
        raise CheckpointError(f"videollama2 needs a VideoLlama2Config, got {type(config).__name__}")
    return config.scheme


def _timed(layout: Layout, clip: Mapping[str, Any]) -> Layout:
    second = np.array(layout.second)
    for modality, starts in ((Modality.VIDEO, clip["frame_seconds"]), (Modality.AUDIO, clip["sound_seconds"])):
        place = layout.modality == modality
        if place.any():
            second[place] = np.repeat(starts, place.sum() // len(starts))
    return with_seconds(layout, second)


def _layouts(scheme: Scheme, inputs: Mapping[str, Any]) -> Iterator[Layout]:
    sounds = inputs.get("feature_attention_mask")
    heard = iter([] if sounds is None else [_heard(scheme, rows) for rows in host(sounds).astype(bool)])
    for ids in prompts_of(inputs):
        yield _layout(scheme, ids, heard)


def _layout(scheme: Scheme, ids: np.ndarray, heard: Iterator[np.ndarray]) -> Layout:
    video, audio = ids == scheme.video_token_id, ids == scheme.audio_token_id
    frame = np.where(video, (np.cumsum(video) - 1) // scheme.pair_tokens * MERGE, -1)
    padding = np.zeros(len(ids), bool)
    count, rest = divmod(int(audio.sum()), scheme.audio_tokens)
    sounds = list(islice(heard, count))
    if count and not rest and len(sounds) == count:
        padding[audio] = ~np.concatenate(sounds)
    return of_places(video, audio, frame=frame, padding=padding)


def _heard(scheme: Scheme, rows: np.ndarray) -> np.ndarray:
    """Whether each audio token's patch has a row that holds sound."""
    times, frequencies = scheme.audio_grid
    return np.repeat(rows[: times * scheme.audio_patch].reshape(times, -1).any(1), frequencies)
