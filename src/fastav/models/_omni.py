"""The Qwen-Omni line: a thinker sees, hears and answers in text; of whole models that also speak, only it is loaded.

A clip with sound is one block in which video and audio tokens alternate by time.
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
from fastav.models._adapters import of_places, with_seconds
from fastav.models._checkpoint import HUB_OPTIONS, readable
from fastav.models._grids import Grids, Places, grid_layouts, timed
from fastav.models._official import (
    CHANNELS_LAST,
    OfficialAdapter,
    Row,
    Sampled,
    bounded,
    for_vllm,
    refuse_written_placeholders,
    rendered,
    sampled,
)

FPS = 2.0  # frames a second of the authors' own preparation
RATE = 16_000  # samples a second
MEL_FRAMES = 100  # columns of the spectrogram a second
LEAST_SAMPLES = 640  # shorter sound makes no token
EXAMPLE_SECONDS = 30.0
KEPT = 0.4  # of a clip: of 10 frames and their sound the paper keeps 4


class OmniAdapter(OfficialAdapter):
    """A family of thinkers.

    whole_class: name of the configuration of whole models. grids: how the release turns frames into tokens.
    positions: positions in time a second. prefix: tokens of a typical prompt before the clip. pooled: whether the audio
    encoder says the mean of two neighbours as one token.
    """

    whole_class: ClassVar[str]
    grids: ClassVar[Grids]
    positions: ClassVar[int]
    prefix: ClassVar[int]
    pooled: ClassVar[bool]
    unused = ("talker.", "token2wav.", "code2wav.")

    def text_only_hint(self, model: PreTrainedModel, arguments: Mapping[str, Any]) -> str | None:
        """How to ask this model for text alone, if `generate` with these arguments would also speak; else None."""
        text = arguments.get("return_audio") is False or arguments.get("generation_mode") in ("text", False)
        if text or not getattr(model, "has_talker", False):
            return None
        return "ask for text only: generation_mode='text' (Qwen2.5-Omni), return_audio=False (Qwen3-Omni)"

    @abstractmethod
    def n_audio_tokens(self, columns: int) -> int:
        """Audio tokens of a spectrogram of so many columns."""

    @abstractmethod
    def starts(self, tokens: int) -> Float[np.ndarray, " tokens"]:
        """When each of a clip's audio tokens starts, in seconds."""

    @abstractmethod
    def turn(self, position: Float[np.ndarray, " tokens"]) -> Float[np.ndarray, " tokens"]:
        """What the tokens of a clip are ordered by, from their positions in time; where it is alike, video is first."""

    def config(self, source: str | None = None) -> PreTrainedConfig:
        """The thinker's configuration in a folder or hub id of a whole model or a thinker; of the release if None."""
        return super().config() if source is None else self._thinker(source)

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """The thinker (in evaluation mode) and the processor from a folder or hub id of a whole model or a thinker.

        Raises: CheckpointError if keys of the thinker are missing, left over, or of another shape, or files cannot be
        read; InstallationError if a package that the family needs is not installed.
        """
        require_packages(self.name, self.packages, "transformers")
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        return super().load(source, **{"config": self._thinker(source, **hub), **options})

    def _thinker(self, source: str, **hub: Any) -> PreTrainedConfig:
        with readable(source):
            whole = "thinker_config" in PreTrainedConfig.get_config_dict(source, **hub)[0]
            kind = getattr(transformers, self.whole_class if whole else self.config_class)
            config = kind.from_pretrained(source, **hub)
        if whole:
            config = config.thinker_config
            config.architectures = [self.model_class]
        return config

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests.

        Raises: MediaError if some clips are shown with their sound and others silent: the models take one switch for
        a whole batch, and place the tokens of silent videos wrongly where it is on. CheckpointError, MissingTrack.
        """
        shown = {request.tracks[1] for request in requests if request.tracks[0]}
        if len(shown) == 2:
            raise MediaError(
                f"{self.name} cannot take videos with and without sound in one batch",
                "ask for them apart, or about all with use='video' (--use video)",
            )
        return super().prepare(processor, requests)

    def row(self, processor: Any, request: Request) -> Row:
        """The processor's tensors for one request, and its layout."""
        shown = self._shown(processor, request)
        media: dict[str, Any] = {}
        if shown.video is not None:
            media |= {"videos": [shown.video.frames], "video_metadata": [shown.video.metadata]}
            media |= _of_video(processor, shown.video)
        if shown.audio is not None:
            # by default what goes past the extractor's `chunk_length` would be cut off
            media |= {"audio": [shown.audio], "audio_kwargs": {"truncation": False}}
        if shown.together:
            media |= _together(processor)
        inputs = dict(processor(text=[shown.text], **media, return_tensors="pt"))
        if shown.together:
            inputs["use_audio_in_video"] = True
        ids = processor.tokenizer.convert_tokens_to_ids
        places = Places(
            video=ids(processor.video_token),
            image=ids(processor.image_token),
            audio=ids(processor.audio_token),
            merge=processor.video_processor.merge_size,
            temporal=processor.video_processor.temporal_patch_size,
        )
        (layout,) = grid_layouts(places, inputs)
        seconds = np.zeros(0) if shown.video is None else shown.video.seconds
        start = request.aligned_clip.require_audio().start if shown.audio is not None else 0.0
        return Row(inputs, self._with_sound(timed(layout, frames=seconds), start))

    def vllm_inputs(self, processor: ProcessorMixin, request: Request) -> VllmInputs:
        """What vLLM is given for a request: one video, one sound, and whether the sound is the video's own."""
        self.require(processor, [request])
        known: Any = processor
        shown = self._shown(known, request)
        media: dict[str, Any] = {}
        options: dict[str, Any] = {}
        if shown.video is not None:
            media["video"] = (shown.video.frames, for_vllm(shown.video))
            options |= _of_video(known, shown.video)
        if shown.audio is not None:
            media["audio"] = (shown.audio, RATE)
        if shown.together:
            assert shown.video is not None
            # vLLM puts sound between the frames before the processor says how long a step in time is
            step = known.video_processor.temporal_patch_size / shown.video.fps
            options |= {"use_audio_in_video": True, "second_per_grid_ts": [step]}
        return VllmInputs(text=shown.text, media=media, options=options)

    def _shown(self, processor: Any, request: Request) -> "_Shown":
        """A request, decoded and sampled."""
        marks = ("image_token", "video_token", "audio_token", "vision_bos_token", "vision_eos_token")
        marks += ("audio_bos_token", "audio_eos_token")
        refuse_written_placeholders(request.question, [getattr(processor, mark) for mark in marks])
        video, audio = request.tracks
        content = [{"type": "video" if video else "audio"}, {"type": "text", "text": request.question}]
        clip = request.aligned_clip
        return _Shown(
            text=rendered(processor, content),
            video=sampled(clip.require_video(), processor.video_processor, fps=FPS) if video else None,
            audio=_padded(np.asarray(clip.require_audio().read(RATE))) if audio else None,
        )

    def _with_sound(self, layout: Layout, start: float | int) -> Layout:
        """The layout with the seconds of its audio tokens, whose sound starts at this second."""
        second, audio = np.array(layout.second), layout.modality == Modality.AUDIO
        second[audio] = start + self.starts(int(audio.sum()))
        return with_seconds(layout, second)

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        known: Any = config
        places = Places(
            video=known.video_token_id,
            image=known.image_token_id,
            audio=known.audio_token_id,
            merge=known.vision_config.spatial_merge_size,
            temporal=known.vision_config.temporal_patch_size,
        )
        return grid_layouts(places, inputs)

    def example(
        self,
        config: PreTrainedConfig,
        *,
        seconds: float | int | None = None,
        audio: int | None = None,
        video: int | None = None,
        text: int,
    ) -> Layout:
        """A typical prompt: some text, a clip of 30 s at 1280 x 720 with its sound, the rest of the text."""
        long = EXAMPLE_SECONDS if seconds is None else seconds
        time, height, width = self.grids.grid(long, 720, 1280)
        n_video = time * height * width if video is None else video
        n_audio = self.n_audio_tokens(ceil(long * MEL_FRAMES)) if audio is None else audio
        frame = np.arange(n_video) // (height * width) * self.grids.temporal
        position = np.concatenate([frame * long / self.grids.frames(long) * self.positions, np.arange(n_audio)])
        order = np.argsort(self.turn(position), kind="stable")
        is_video = order < n_video
        latest = np.maximum.accumulate(np.where(is_video, np.append(frame, np.zeros(n_audio, int))[order], -1))
        before = min(self.prefix, text)
        return Layout.join(
            [
                Layout.of(Modality.TEXT, before),
                of_places(is_video, ~is_video, frame=latest),
                Layout.of(Modality.TEXT, text - before),
            ]
        )

    def language_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The thinker: the model itself, or its part that does not speak."""
        return getattr(model, "thinker", model)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The thinker's text model, which newer versions of transformers put one level deeper."""
        inner: Any = model.get_submodule("model")
        return getattr(inner, "language_model", inner)

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The vision and audio towers with their projectors."""
        outer: Any = model if hasattr(model, "visual") else model.get_submodule("model")
        return outer.visual, outer.audio_tower

    def audio_attention(self) -> AudioAttention:
        """The audio tower's, within windows of a sound."""
        return WindowedAttention(self)


class WindowedAttention(AudioAttention):
    """Of the audio tower's last layer, whose input is all sounds one after another, in windows that see themselves."""

    def __init__(self, adapter: OmniAdapter) -> None:
        self.adapter = adapter

    def modules(self, model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
        """The audio tower, and the attention of its last layer."""
        tower = self.adapter.encoders(model)[1]
        return tower, tower.get_submodule("layers")[-1].self_attn  # pyright: ignore[reportIndexIssue]

    def scores(
        self, attention: nn.Module, encoder_inputs: Mapping[str, Any], attention_inputs: Mapping[str, Any]
    ) -> Float[Tensor, " tokens"]:
        """Of each audio token: the mean over heads and over its window, and over its two positions where pooled.

        It waits for the device, as the tower does anyway, for the lengths of windows and sounds.
        """
        module: Any = attention
        hidden = attention_inputs["hidden_states"]
        query, key = (
            project(hidden).unflatten(-1, (module.num_heads, -1)).transpose(0, 1)
            for project in (module.q_proj, module.k_proj)
        )
        lengths = attention_inputs["cu_seqlens"].diff().tolist()
        windows = zip(query.split(lengths, 1), key.split(lengths, 1), strict=True)
        scores = torch.cat([_received(q, k, module.scaling) for q, k in windows])
        if not self.adapter.pooled:
            return scores
        parts = scores.split([(columns + 1) // 2 for columns in encoder_inputs["feature_lens"].tolist()])
        return torch.cat([part[: len(part) // 2 * 2].view(-1, 2).mean(1) for part in parts])


def _received(
    query: Float[Tensor, "heads window head"], key: Float[Tensor, "heads window head"], scaling: float | int
) -> Float[Tensor, " window"]:
    """What each position of a window receives, mean over heads and queries."""
    return ((query @ key.transpose(1, 2)).float() * scaling).softmax(-1).mean((0, 1))


class _Shown(NamedTuple):
    """One request, decoded and sampled.  text: the conversation, with the marks of media."""

    text: str
    video: Sampled | None
    audio: Float32[np.ndarray, " samples"] | None

    @property
    def together(self) -> bool:
        """Whether a video is shown with its own sound."""
        return self.video is not None and self.audio is not None


def _of_video(processor: Any, video: Sampled) -> dict[str, Any]:
    """Arguments about frames that are sampled already.

    The processor cannot know the rate, by which it and the model place video and sound in time.
    """
    arguments = {"do_sample_frames": False, "fps": video.fps, "input_data_format": CHANNELS_LAST}
    return arguments | bounded(processor.video_processor)


def _together(processor: Any) -> dict[str, Any]:
    """Arguments that make a processor put a video's sound between its frames; newer ones want to know whose it is."""
    if hasattr(processor, "_resolve_audio_from_video"):
        return {"load_audio_from_video": True, "audio_from_video_indices": [0]}
    return {"use_audio_in_video": True}


def _padded(wave: Float32[np.ndarray, " samples"]) -> Float32[np.ndarray, " longer"]:
    """Sound with enough silence after it for one token, which only the shortest needs."""
    return np.pad(wave, (0, max(0, LEAST_SAMPLES - len(wave))))
