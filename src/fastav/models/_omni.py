"""The base of the Qwen-Omni families.

Their thinker reads video and audio and answers in text. Full models have a talker for speech too, which is not loaded.
A clip with audio is one block of tokens, in which video and audio alternate by time.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import transformers
from jaxtyping import Float, Float32
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import AudioAttention, Prepared, Request, VllmInputs
from fastav.errors import MediaError
from fastav.installation import require_packages
from fastav.layout import Layout, Modality
from fastav.models._adapters import layout_from_masks, with_seconds
from fastav.models._checkpoint import HUB_OPTIONS, readable
from fastav.models._grids import Grids, MediaTokens, grid_layouts, with_frame_seconds
from fastav.models._official import (
    CHANNELS_LAST,
    OfficialAdapter,
    PreparedRequest,
    SampledVideo,
    pixel_cap,
    refuse_placeholders,
    render_chat,
    sample_video,
    vllm_metadata,
)

FPS = 2.0  # frames per second of the authors' preprocessing
RATE = 16_000  # samples per second
MEL_FRAMES = 100  # columns of the spectrogram per second
MIN_SAMPLES = 640  # shorter audio has no token
EXAMPLE_SECONDS = 30.0
KEEP_SHARE = 0.4  # of a clip's tokens: of 10 frames and their audio the paper keeps 4


class OmniAdapter(OfficialAdapter):
    """The base class of thinkers.

    full_config_class: class name of the configuration of full models. grids: how the released model turns frames into
    tokens. positions_per_second: steps of the time axis of positions. prefix: tokens of a typical prompt before the
    clip. pooled: whether the audio encoder's output is the mean of every two positions.
    """

    full_config_class: ClassVar[str]
    grids: ClassVar[Grids]
    positions_per_second: ClassVar[int]
    pooled: ClassVar[bool]
    unused_prefixes = ("talker.", "token2wav.", "code2wav.")

    @abstractmethod
    def n_audio_tokens(self, columns: int) -> int:
        """Number of audio tokens of a spectrogram with this many columns."""

    @abstractmethod
    def audio_starts(self, tokens: int) -> Float[np.ndarray, " tokens"]:
        """Start of each of a clip's audio tokens, in seconds."""

    @abstractmethod
    def sort_key(self, position: Float[np.ndarray, " tokens"]) -> Float[np.ndarray, " tokens"]:
        """The sort key of a clip's tokens, from their positions in time; where keys are equal, video comes first."""

    def config(self, source: str | None = None) -> PreTrainedConfig:
        """The thinker's configuration, in a folder or hub id of a full model or thinker; None for the release's."""
        return super().config() if source is None else self._thinker(source)

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """The thinker (in evaluation mode) and the processor from a folder or hub id of a full model or a thinker.

        Raises: CheckpointError if keys of the thinker are missing, unexpected, or of another shape, or files cannot be
        read; InstallationError if a package that the family needs is not installed.
        """
        require_packages(self.name, self.packages, "transformers")
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        return super().load(source, **{"config": self._thinker(source, **hub), **options})

    def _thinker(self, source: str, **hub: Any) -> PreTrainedConfig:
        with readable(source):
            is_full = "thinker_config" in PreTrainedConfig.get_config_dict(source, **hub)[0]
            config_class = getattr(transformers, self.full_config_class if is_full else self.config_class)
            config = config_class.from_pretrained(source, **hub)
        if is_full:
            config = config.thinker_config
            config.architectures = [self.model_class]
        return config

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests.

        Raises: MediaError if some videos are used with audio and others without: `use_audio_in_video` is one switch
        for a whole batch, and if it is on, the models give tokens of videos without audio wrong positions.
        CheckpointError, MissingTrack: as `OfficialAdapter.prepare`.
        """
        video_with_audio = {request.tracks[1] for request in requests if request.tracks[0]}
        if len(video_with_audio) == 2:
            raise MediaError(
                f"{self.name} cannot take videos with and without audio in one batch",
                "put them in separate batches, or pass use='video' (--use video) for all",
            )
        return super().prepare(processor, requests)

    def prepare_request(self, processor: Any, request: Request) -> PreparedRequest:
        """The processor's tensors for one request, and its layout."""
        sample = self._sample(processor, request)
        media: dict[str, Any] = {}
        if sample.video is not None:
            media |= {"videos": [sample.video.frames], "video_metadata": [sample.video.metadata]}
            media |= _video_options(processor, sample.video)
        if sample.audio is not None:
            # by default the extractor cuts off audio after `chunk_length`
            media |= {"audio": [sample.audio], "audio_kwargs": {"truncation": False}}
        if sample.has_both:
            media |= _interleave_options(processor)
        inputs = dict(processor(text=[sample.text], **media, return_tensors="pt"))
        if sample.has_both:
            inputs["use_audio_in_video"] = True
        ids = processor.tokenizer.convert_tokens_to_ids
        media_tokens = MediaTokens(
            video=ids(processor.video_token),
            image=ids(processor.image_token),
            audio=ids(processor.audio_token),
            merge=processor.video_processor.merge_size,
            temporal=processor.video_processor.temporal_patch_size,
        )
        (layout,) = grid_layouts(media_tokens, inputs)
        seconds = np.zeros(0) if sample.video is None else sample.video.seconds
        start = request.aligned_clip.require_audio().start if sample.audio is not None else 0.0
        return PreparedRequest(inputs, self._with_audio_seconds(with_frame_seconds(layout, frames=seconds), start))

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """A request as vLLM takes it: one video, one audio track, and whether both are of the same clip."""
        self.check_requests(processor, [request])
        family_processor: Any = processor
        sample = self._sample(family_processor, request)
        media: dict[str, Any] = {}
        options: dict[str, Any] = {}
        if sample.video is not None:
            media["video"] = (sample.video.frames, vllm_metadata(sample.video))
            options |= _video_options(family_processor, sample.video)
        if sample.audio is not None:
            media["audio"] = (sample.audio, RATE)
        if sample.has_both:
            assert sample.video is not None
            # vLLM interleaves audio and video before the processor reports the duration of a time step
            step = family_processor.video_processor.temporal_patch_size / sample.video.fps
            options |= {"use_audio_in_video": True, "second_per_grid_ts": [step]}
        return VllmInputs(text=sample.text, media=media, options=options)

    def _sample(self, processor: Any, request: Request) -> "_SampledRequest":
        """Decode and sample a request."""
        placeholders = ("image_token", "video_token", "audio_token", "vision_bos_token", "vision_eos_token")
        placeholders += ("audio_bos_token", "audio_eos_token")
        refuse_placeholders(request.question, [getattr(processor, mark) for mark in placeholders])
        has_video, has_audio = request.tracks
        content = [{"type": "video" if has_video else "audio"}, {"type": "text", "text": request.question}]
        clip = request.aligned_clip
        return _SampledRequest(
            text=render_chat(processor, content),
            video=sample_video(clip.require_video(), processor.video_processor, fps=FPS) if has_video else None,
            audio=_pad_audio(np.asarray(clip.require_audio().read(RATE))) if has_audio else None,
        )

    def _with_audio_seconds(self, layout: Layout, start: float | int) -> Layout:
        """The layout with the seconds of its audio tokens.  start: start of the audio track, in seconds."""
        second, audio = np.array(layout.second), layout.modality == Modality.AUDIO
        second[audio] = start + self.audio_starts(int(audio.sum()))
        return with_seconds(layout, second)

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        settings: Any = config
        media_tokens = MediaTokens(
            video=settings.video_token_id,
            image=settings.image_token_id,
            audio=settings.audio_token_id,
            merge=settings.vision_config.spatial_merge_size,
            temporal=settings.vision_config.temporal_patch_size,
        )
        return grid_layouts(media_tokens, inputs)

    def example_clip(
        self, config: PreTrainedConfig, seconds: float | None, audio: int | None, video: int | None
    ) -> Layout:
        """A 1280 x 720 clip (30 s unless `seconds` is set) with its audio between the frames."""
        seconds = EXAMPLE_SECONDS if seconds is None else seconds
        time, height, width = self.grids.grid(seconds, 720, 1280)
        n_video = time * height * width if video is None else video
        n_audio = self.n_audio_tokens(ceil(seconds * MEL_FRAMES)) if audio is None else audio
        frame = np.arange(n_video) // (height * width) * self.grids.temporal
        position = np.concatenate(
            [frame * seconds / self.grids.frames(seconds) * self.positions_per_second, np.arange(n_audio)]
        )
        order = np.argsort(self.sort_key(position), kind="stable")
        is_video = order < n_video
        last_frame = np.maximum.accumulate(np.where(is_video, np.append(frame, np.zeros(n_audio, int))[order], -1))
        return layout_from_masks(is_video, ~is_video, frame=last_frame)

    def language_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The thinker: the model itself, or the part of a full model that writes text."""
        return getattr(model, "thinker", model)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The thinker's text model, which is one level deeper in newer versions of transformers."""
        inner: Any = model.get_submodule("model")
        return getattr(inner, "language_model", inner)

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The vision and audio towers with their projectors."""
        outer: Any = model if hasattr(model, "visual") else model.get_submodule("model")
        return outer.visual, outer.audio_tower

    def audio_attention(self) -> AudioAttention:
        """The attention of the audio tower, within windows of each track."""
        return WindowedAttention(self)


class WindowedAttention(AudioAttention):
    """The attention in the audio tower's last layer: all tracks are concatenated, and each window attends to itself."""

    def __init__(self, adapter: OmniAdapter) -> None:
        self.adapter = adapter

    def modules(self, model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
        """The audio tower, and the attention of its last layer."""
        tower = self.adapter.encoders(model)[1]
        return tower, tower.get_submodule("layers")[-1].self_attn  # pyright: ignore[reportIndexIssue]

    def scores(
        self, attention: nn.Module, encoder_inputs: Mapping[str, Any], attention_inputs: Mapping[str, Any]
    ) -> Float[Tensor, " tokens"]:
        """The attention that each audio token receives, [tokens]: the mean over heads and its window.

        If the encoder pools its output, it is also the mean over a token's two positions.
        It waits for the device to read the lengths of windows and tracks, as the tower does anyway.
        """
        module: Any = attention
        hidden = attention_inputs["hidden_states"]
        query, key = (
            project(hidden).unflatten(-1, (module.num_heads, -1)).transpose(0, 1)
            for project in (module.q_proj, module.k_proj)
        )
        window_lengths = attention_inputs["cu_seqlens"].diff().tolist()
        windows = zip(query.split(window_lengths, 1), key.split(window_lengths, 1), strict=True)
        scores = torch.cat([_mean_attention(q, k, module.scaling) for q, k in windows])
        if not self.adapter.pooled:
            return scores
        tracks = scores.split([(columns + 1) // 2 for columns in encoder_inputs["feature_lens"].tolist()])
        return torch.cat([track[: len(track) // 2 * 2].view(-1, 2).mean(1) for track in tracks])


def _mean_attention(
    query: Float[Tensor, "heads window head"], key: Float[Tensor, "heads window head"], scaling: float | int
) -> Float[Tensor, " window"]:
    """The attention that each position of a window receives: the mean over heads and queries."""
    return ((query @ key.transpose(1, 2)).float() * scaling).softmax(-1).mean((0, 1))


class _SampledRequest(NamedTuple):
    """One request, decoded and sampled.  text: the conversation, with placeholders for media."""

    text: str
    video: SampledVideo | None
    audio: Float32[np.ndarray, " samples"] | None

    @property
    def has_both(self) -> bool:
        """Whether the request uses both video and audio of its clip."""
        return self.video is not None and self.audio is not None


def _video_options(processor: Any, video: SampledVideo) -> dict[str, Any]:
    """The processor's arguments for frames that are already sampled.

    The processor cannot infer the frame rate, from which it and the model compute the positions of video and audio.
    """
    arguments = {"do_sample_frames": False, "fps": video.fps, "input_data_format": CHANNELS_LAST}
    return arguments | pixel_cap(processor.video_processor)


def _interleave_options(processor: Any) -> dict[str, Any]:
    """The processor's arguments to interleave audio and video; newer ones need the index of the audio's video, too."""
    if hasattr(processor, "_resolve_audio_from_video"):
        return {"load_audio_from_video": True, "audio_from_video_indices": [0]}
    return {"use_audio_in_video": True}


def _pad_audio(wave: Float32[np.ndarray, " samples"]) -> Float32[np.ndarray, " padded"]:
    """The waveform; if it is too short for one token, with silence after it."""
    return np.pad(wave, (0, max(0, MIN_SAMPLES - len(wave))))
