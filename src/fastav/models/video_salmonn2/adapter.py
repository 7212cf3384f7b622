"""What the rest of fastav must know about video-SALMONN 2."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import ModelAdapter, Prepared, Request, VllmInputs
from fastav.errors import CheckpointError
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.models._adapters import host, of_places, prompts_of, qwen2_shape, with_seconds
from fastav.models._checkpoint import load, readable
from fastav.models._prompts import shown_whole
from fastav.models.video_salmonn2.configuration import VideoSalmonn2Config
from fastav.models.video_salmonn2.modeling import VideoSalmonn2ForConditionalGeneration
from fastav.models.video_salmonn2.processing import VideoSalmonn2Processor
from fastav.models.video_salmonn2.scheme import COLUMNS, HOP, PIECE_SECONDS, RATE, Scheme
from fastav.models.video_salmonn2.video import sample_frames
from fastav.plan import Frames, Keep, Plan
from fastav.presets import fastav, plus, trim

PREFIX = 14  # tokens before the clip: the system message and the start of the user's
TYPICAL_SECONDS = 10  # of the clips in AVHBench and AVQA, on which the paper measures
TYPICAL_FPS = 25
ORIGINAL = "VideoSALMONN2ForCausalLM"


class VideoSalmonn2Adapter(ModelAdapter):
    """video-SALMONN 2, 7B.

    Frames and sound are interleaved: a frame's patches and newlines are video, the audio tokens after it have its
    index. The times that follow the frames of silent videos are text, their padding included.
    """

    name = "video-salmonn2"
    architectures = frozenset({ORIGINAL, "VideoSalmonn2ForConditionalGeneration"})
    checkpoint = "tsinghua-ee/video-SALMONN-2"
    steps_wait = False
    presets: ClassVar[Mapping[str, Plan]] = {
        "fastav": fastav(Keep(media=Frames(4))),
        "fastav-plus": plus(),
        "fastav-trim": trim(),
    }

    def config(self, source: str | None = None) -> VideoSalmonn2Config:
        """The configuration in a local folder or hub id; of the release, without any download, if None."""
        if source is None:
            return VideoSalmonn2Config(architectures=[ORIGINAL])
        with readable(source):
            return VideoSalmonn2Config.from_pretrained(source)

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Model (in evaluation mode) and processor from a local folder or a hub id.

        Raises: CheckpointError if keys are missing, left over, or of another shape, or files cannot be read.
        """
        return load(
            source,
            options,
            config=VideoSalmonn2Config,
            processor=VideoSalmonn2Processor,
            model=VideoSalmonn2ForConditionalGeneration,
        )

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of this configuration whose weights are not loaded."""
        _scheme(config)
        known: Any = config
        return VideoSalmonn2ForConditionalGeneration(known)

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests.

        Raises: CheckpointError for another model's processor; MissingTrack for a clip with neither track.
        """
        if not isinstance(processor, VideoSalmonn2Processor):
            raise CheckpointError(
                f"{self.name} needs a VideoSalmonn2Processor, got {type(processor).__name__}", "use the one `load` gave"
            )
        clips = [processor.read(request) for request in requests]
        inputs = processor(
            [
                processor.prompt(request.question, video=clip["video"] is not None, audio=clip["audio"] is not None)
                for request, clip in zip(requests, clips, strict=True)
            ],
            **processor.media_arguments(clips),
        )
        return Prepared(inputs=dict(inputs), layouts=tuple(_timed(processor.media, inputs, clips)))

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
        """A typical prompt: some text, a clip of 10 s with its sound, the rest of the text."""
        scheme = _scheme(config)
        seconds = TYPICAL_SECONDS if seconds is None else seconds
        frames = len(sample_frames(max(1, round(seconds * TYPICAL_FPS)), TYPICAL_FPS, scheme))
        video = frames * scheme.frame_tokens if video is None else video
        padding = None
        if audio is None:
            pieces = max(1, math.ceil(seconds / PIECE_SECONDS))
            each, rest = scheme.spread(pieces * scheme.piece_tokens, frames, seconds)
            sound = np.arange(pieces * COLUMNS) * HOP < seconds * RATE
            padding = ~scheme.heard(sound.reshape(pieces, COLUMNS))[np.concatenate([each.ravel(), rest])]
            audio = len(padding)
        before = min(PREFIX, text)
        clip = _interleaved(scheme, video, audio, padding)
        return Layout.join([Layout.of(Modality.TEXT, before), clip, Layout.of(Modality.TEXT, text - before)])

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the Qwen2 decoder."""
        return qwen2_shape(config)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """Qwen2."""
        return model.get_decoder()

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """SigLIP and its projector; Whisper, its norm, the Q-Former and its two projectors."""
        ears = ("speech_encoder", "ln_speech", "speech_Qformer", "speech_llama_proj", "final_linear")
        names = ("model.vision_tower", "model.mm_projector", *ears)
        return tuple(model.get_submodule(name) for name in names)


def _scheme(config: PreTrainedConfig) -> Scheme:
    if not isinstance(config, VideoSalmonn2Config):
        raise CheckpointError(f"video-salmonn2 needs a VideoSalmonn2Config, got {type(config).__name__}")
    return config.scheme


def _interleaved(scheme: Scheme, video: int, audio: int, padding: np.ndarray | None) -> Layout:
    """Frames of so many tokens in all, each followed by its share of the audio tokens."""
    frames = -(-video // scheme.frame_tokens)
    seen = np.arange(video) // scheme.frame_tokens
    accompanied = np.arange(audio) * frames // max(1, audio) if frames else np.full(audio, -1)
    layout = Layout.join(
        [
            Layout.of(Modality.VIDEO, video, frame=seen),
            Layout.of(Modality.AUDIO, audio, frame=accompanied, padding=padding),
        ]
    )
    order = np.argsort(layout.frame, kind="stable")
    return Layout(**{name: getattr(layout, name)[order] for name in Layout.__slots__})


def _timed(scheme: Scheme, inputs: Mapping[str, Any], clips: Sequence[Mapping[str, Any]]) -> Iterator[Layout]:
    """The layouts of prepared clips, with the second at which every frame is shown and every audio token starts."""
    heard = iter(np.zeros(0))
    if "piece_index" in inputs:
        pieces = inputs["piece_index"].numpy()[:, None] * PIECE_SECONDS + scheme.piece_seconds()
        heard = iter(pieces.ravel()[inputs["audio_index"].numpy()])
    for layout, clip in zip(_layouts(scheme, inputs), clips, strict=True):
        second = np.array(layout.second)
        video, audio = layout.modality == Modality.VIDEO, layout.modality == Modality.AUDIO
        second[video] = clip["shown"][layout.frame[video]]
        second[audio] = [clip["sound_start"] + next(heard) for _ in range(audio.sum())]
        yield with_seconds(layout, second)


def _layouts(scheme: Scheme, inputs: Mapping[str, Any]) -> Iterator[Layout]:
    silent = iter(_silent(scheme, inputs))
    for ids in prompts_of(inputs):
        yield _layout(scheme, ids, silent)


def _silent(scheme: Scheme, inputs: Mapping[str, Any]) -> np.ndarray:
    """Whether each audio placeholder of the batch is padding; empty if that is not known."""
    columns, index = inputs.get("feature_attention_mask"), inputs.get("audio_index")
    if columns is None:
        return np.zeros(0, bool)
    silent = ~scheme.heard(host(columns).astype(bool))
    return silent if index is None else silent[host(index)]


def _layout(scheme: Scheme, ids: np.ndarray, silent: Iterator[np.bool_]) -> Layout:
    video, audio = ids == scheme.video_token_id, ids == scheme.audio_token_id
    frame = np.where(video | audio, (np.cumsum(video) - 1) // scheme.frame_tokens, -1)
    padding = np.zeros(len(ids), bool)
    padding[audio] = [next(silent, False) for _ in range(audio.sum())]
    return of_places(video, audio, frame=frame, padding=padding)
