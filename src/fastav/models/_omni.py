"""The base of the Qwen-Omni families.

Their thinker reads video and audio and answers in text. Full models have a talker for speech too, which is not loaded.
A clip with audio is one block of tokens, in which video and audio alternate by time.
"""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import ceil
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import EncoderAttention, EncoderCall, Prepared, Transcript, VllmInputs
from fastav.errors import MediaError, UnsupportedModel
from fastav.installation import require_packages
from fastav.layout import Layout, Modality
from fastav.messages import Kind, Media
from fastav.models._adapters import iter_rows, layout_from_masks
from fastav.models._checkpoint import HUB_OPTIONS, readable
from fastav.models._encoder_attention import sequence_attention
from fastav.models._grids import Grids, MediaTokens, grid_pieces
from fastav.models._official import (
    CHANNELS_LAST,
    OfficialAdapter,
    SampledVideo,
    concatenate,
    pixel_cap,
    sample_video,
    vllm_media,
    vllm_metadata,
)
from fastav.models._patch_attention import PatchAttention
from fastav.models._pieces import Pieces, Sample
from fastav.request import Request

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
        videos = (media for request in requests for media in request.media if media.kind is Kind.VIDEO)
        if len({media.tracks[1] for media in videos}) == 2:
            where = "prompt" if len(requests) == 1 else "batch"
            raise MediaError(
                f"{self.name} cannot take videos with and without audio in one {where}",
                "pass use='video' (--use video) for all"
                + (", or put them in separate batches" if where == "batch" else ""),
            )
        return super().prepare(processor, requests)

    def sample(self, processor: Any, media: Media) -> Sample:
        """A clip with its sound, a sound, or an image."""
        if media.kind is Kind.IMAGE:
            return Sample(parts=[{"type": "image"}], images=[media.clip.require_video().read([0])[0]])
        has_video, has_audio = media.tracks
        clip = media.aligned_clip
        video = sample_video(clip.require_video(), processor.video_processor, fps=FPS) if has_video else None
        return Sample(
            parts=[{"type": "audio" if video is None else "video"}],
            videos=[] if video is None else [video],
            sounds=[_pad_audio(np.asarray(clip.require_audio().read(RATE)))] if has_audio else [],
            seconds=np.zeros(0) if video is None else video.seconds,
            start=clip.require_audio().start if has_audio else 0.0,
        )

    def process(self, processor: Any, text: str, samples: Sequence[Sample]) -> dict[str, Any]:
        """The processor's tensors for a rendered conversation and its media.

        Each medium is processed by itself, with the text up to it: the processor has one frame rate for all videos of a
        call. The tokens are the same, because tokenizers of these models split texts at the marks around media.
        """
        texts = _split_after_media(text, self._marks(processor)) if len(samples) > 1 else [text]
        rows = [
            self._process_one(processor, part, sample) for part, sample in zip(texts, samples or [None], strict=True)
        ]
        inputs = concatenate(rows)
        if any(sample.videos and sample.sounds for sample in samples):
            inputs["use_audio_in_video"] = True
        return inputs

    def _process_one(self, processor: Any, text: str, sample: Sample | None) -> dict[str, Any]:
        """The processor's tensors for a text with one medium or none."""
        media: dict[str, Any] = {}
        if sample is not None and sample.images:
            media |= {"images": list(sample.images), "images_kwargs": {"input_data_format": CHANNELS_LAST}}
        if sample is not None and sample.videos:
            (video,) = sample.videos
            media |= {"videos": [video.frames], "video_metadata": [video.metadata], **_video_options(processor, video)}
        if sample is not None and sample.sounds:
            # by default the extractor cuts off audio after `chunk_length`
            media |= {"audio": list(sample.sounds), "audio_kwargs": {"truncation": False}}
        if sample is not None and sample.videos and sample.sounds:
            media |= _interleave_options(processor)
        return dict(processor(text=[text], **media, return_tensors="pt"))

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """A request as vLLM takes it: videos, sounds and images, and whether the sounds are those of the videos.

        Raises: UnsupportedModel if vLLM's processor, which has one frame rate and one rule for all videos of a prompt,
        would read the prompt in another way than `prepare`.
        """
        self.check_requests(processor, [request])
        family_processor: Any = processor
        samples = [self.sample(family_processor, media) for media in request.media]
        videos = [video for sample in samples for video in sample.videos]
        media = vllm_media(
            video=[(video.frames, vllm_metadata(video)) for video in videos],
            audio=[(sound, RATE) for sample in samples for sound in sample.sounds],
            image=[image for sample in samples for image in sample.images],
        )
        options: dict[str, Any] = {}
        if len({video.fps for video in videos}) > 1:
            raise UnsupportedModel(
                f"{self.name} in vLLM takes videos of one frame rate, and these are sampled at "
                f"{' and '.join(f'{video.fps:.4g}' for video in videos)} frames per second",
                "ask about clips of equal length, or use the engine transformers",
            )
        if videos:
            options |= _video_options(family_processor, videos[0])
        if any(sample.videos and sample.sounds for sample in samples):
            if len(request.media) > 1:
                raise UnsupportedModel(
                    f"{self.name} in vLLM takes one clip with its sound per prompt, and no other media beside it",
                    "pass use='video', or use the engine transformers",
                )
            # vLLM interleaves audio and video before the processor reports the duration of a time step
            step = family_processor.video_processor.temporal_patch_size / videos[0].fps
            options |= {"use_audio_in_video": True, "second_per_grid_ts": [step]}
        _, text = self.transcript(family_processor, request, samples, Transcript())
        return VllmInputs(text=text, media=media, options=options)

    def _marks(self, processor: Any) -> tuple[list[str], list[str]]:
        """The placeholders of media, and the marks that end a block of media."""
        tokens = [processor.image_token, processor.video_token, processor.audio_token]
        return tokens, [processor.vision_eos_token, processor.audio_eos_token]

    def placeholders(self, processor: Any) -> Sequence[str]:
        """The words that stand for media, and the marks around them."""
        tokens, ends = self._marks(processor)
        return [*tokens, *ends, processor.vision_bos_token, processor.audio_bos_token]

    def media_tokens(self, processor: Any) -> MediaTokens:
        """The ids of media tokens, from the processor."""
        ids = processor.tokenizer.convert_tokens_to_ids
        return MediaTokens(
            video=ids(processor.video_token),
            image=ids(processor.image_token),
            audio=ids(processor.audio_token),
            merge=processor.video_processor.merge_size,
            temporal=processor.video_processor.temporal_patch_size,
        )

    def config_tokens(self, config: Any) -> MediaTokens:
        """The ids of media tokens, from the model's configuration."""
        return MediaTokens(
            video=config.video_token_id,
            image=config.image_token_id,
            audio=config.audio_token_id,
            merge=config.vision_config.spatial_merge_size,
            temporal=config.vision_config.temporal_patch_size,
        )

    def pieces(self, media_tokens: MediaTokens, inputs: Mapping[str, Any]) -> Iterator[Pieces]:
        """The media tokens of each prompt of a batch, from the arguments of `forward` alone."""
        sounds = (self.n_audio_tokens(int(mask.sum())) for mask in iter_rows(inputs, "feature_attention_mask"))
        return grid_pieces(media_tokens, inputs, sounds)

    def audio_seconds(
        self, sound: Int[np.ndarray, " tokens"], index: Int[np.ndarray, " tokens"]
    ) -> Float[np.ndarray, " tokens"]:
        """Start of audio tokens in their track, in seconds."""
        return self.audio_starts(int(index.max(initial=-1)) + 1)[index]

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

    def audio_attention(self) -> EncoderAttention:
        """The attention of the audio tower, within windows of each track."""
        return WindowedAttention(self)

    def vision_attention(self) -> EncoderAttention:
        """The attention of the vision tower, within two frames."""
        return PatchAttention(self)


class WindowedAttention(EncoderAttention):
    """The attention in the audio tower's last layer: all tracks are concatenated, and each window attends to itself."""

    modalities = (Modality.AUDIO,)

    def __init__(self, adapter: OmniAdapter) -> None:
        self.adapter = adapter

    def modules(self, model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
        """The audio tower, and the attention of its last layer."""
        tower = self.adapter.encoders(model)[1]
        return tower, tower.get_submodule("layers")[-1].self_attn  # pyright: ignore[reportIndexIssue]

    def begin(self, call: EncoderCall) -> list[int]:
        """The number of positions of each track."""
        return [(columns + 1) // 2 for columns in call.inputs["feature_lens"].tolist()] if self.adapter.pooled else []

    def scores(
        self, attention: nn.Module, call: list[int], attention_inputs: Mapping[str, Any]
    ) -> Float[Tensor, " tokens"]:
        """The attention that each audio token receives, [tokens]: the mean over heads and its window.

        If the encoder pools its output, it is also the mean over a token's two positions.
        It waits for the device to read the lengths of windows, as the tower does anyway.
        """
        module: Any = attention
        hidden, lengths = attention_inputs["hidden_states"], attention_inputs["cu_seqlens"].diff().tolist()
        query, key = (
            project(hidden).unflatten(-1, (module.num_heads, -1)) for project in (module.q_proj, module.k_proj)
        )
        scores = sequence_attention(query, key, lengths, module.scaling)
        if not self.adapter.pooled:
            return scores
        return torch.cat([track[: len(track) // 2 * 2].view(-1, 2).mean(1) for track in scores.split(call)])


def _split_after_media(text: str, marks: tuple[Sequence[str], Sequence[str]]) -> list[str]:
    """A text in parts with one placeholder each; all but the last part end with the mark that ends its media."""
    placeholders, ends = ("|".join(map(re.escape, words)) for words in marks)
    stops = [match.end() for match in re.finditer(f"(?:{placeholders})(?:{ends})", text)]
    return [text[start:stop] for start, stop in pairwise([0, *stops[:-1], len(text)])]


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
