"""The adapter of Gemma 3n."""

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastav.adapter import Request
from fastav.errors import MissingTrack
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.models._adapters import iter_rows, layout_from_masks, prompt_ids, with_seconds
from fastav.models._frame_sampling import frame_indices
from fastav.models._gemma import PIECE, RATE, audio_pieces, gemma_plan, gemma_shape, piece_lengths, token_runs
from fastav.models._official import CHANNELS_LAST, OfficialAdapter, PreparedRequest, refuse_placeholders, render_chat
from fastav.plan import Keep, Plan, Tokens
from fastav.presets import plus, trim

MAX_FRAMES = 32  # one per started second
FRAME_TOKENS, PIECE_TOKENS = 256, 188
HOP, STRIDE = 160, 16  # samples between mel frames, and mel frames per token
EXAMPLE_SECONDS = 30.0


class Gemma3nAdapter(OfficialAdapter):
    """Gemma 3n: frames of a video as images, then the audio in pieces of 30 s, then the question.

    The model takes no videos: a clip becomes one image per started second, at most 32, each from the middle of its part
    of the clip. Every piece of audio is padded to 30 s and 188 tokens, so that a clip's answer does not depend on the
    length of another clip's audio in the batch; tokens after the end of the audio are padding.

    The paper has no settings for this model. The preset `fastav` keeps the first 10 audio tokens and all images, as the
    paper does for VideoLLaMA2, where video also comes before audio. The last 15 of the 35 layers read the keys and
    values of earlier ones, and every fifth layer attends to all tokens. So the cut by position is at layer 10, the
    middle one of those that compute keys and values, and the one fine cut at layer 15; see `gemma_plan`.
    """

    name = "gemma3n"
    prefix = 4  # start of text, and the role
    architectures = frozenset({"Gemma3nForConditionalGeneration"})
    checkpoint = "google/gemma-3n-E4B-it"
    presets: ClassVar[Mapping[str, Plan]] = {
        "fastav": gemma_plan(Keep(audio=Tokens(10)), position_layer=10, fine_layer=15, has_images=False),
        "fastav-plus": plus(),
        "fastav-trim": trim(),
    }
    config_class = "Gemma3nConfig"
    model_class = "Gemma3nForConditionalGeneration"
    processor_class = "Gemma3nProcessor"
    packages = ("timm", "torchvision")
    release: ClassVar[Mapping[str, Any]] = {}  # transformers' defaults are those of the released model

    def prepare_request(self, processor: Any, request: Request) -> PreparedRequest:
        """The processor's tensors for one request, and its layout.

        Raises: MissingTrack, MediaError.
        """
        refuse_placeholders(request.question, [processor.image_token, processor.audio_token])
        has_video, has_audio = request.tracks
        if not (has_video or has_audio):
            raise MissingTrack(f"{request.clip.name} has neither a video nor an audio track")
        track = request.clip.require_video() if has_video else None
        indices = [] if track is None else frame_indices(track.frames, track.duration, max_frames=MAX_FRAMES)
        pieces = audio_pieces(request.clip) if has_audio else []
        content = [{"type": "image"} for _ in indices] + [{"type": "audio"} for _ in pieces]
        inputs = processor(
            text=[render_chat(processor, [*content, {"type": "text", "text": request.question}])],
            images=None if track is None else list(track.read(indices)),
            images_kwargs={"input_data_format": CHANNELS_LAST},
            audio=pieces or None,
            audio_kwargs={"padding": "max_length"},
            return_tensors="pt",
        )
        (layout,) = _layouts(processor.image_token_id, processor.audio_token_id, inputs)
        second, image, audio = np.array(layout.second), layout.frame >= 0, layout.modality == Modality.AUDIO
        if track is not None:
            second[image] = track.seconds(indices)[layout.frame[image]]
        number, index = token_runs(audio)
        if has_audio:
            start = request.clip.require_audio().start
            second[audio] = start + (number[audio] * PIECE + index[audio] * STRIDE * HOP) / RATE
        return PreparedRequest(dict(inputs), with_seconds(layout, second))

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        settings: Any = config
        return tuple(_layouts(settings.image_token_id, settings.audio_token_id, inputs))

    def example_clip(
        self, config: PreTrainedConfig, seconds: float | None, audio: int | None, video: int | None
    ) -> Layout:
        """Images of a clip (30 s unless `seconds` is set), then its audio."""
        seconds = EXAMPLE_SECONDS if seconds is None else seconds
        images = len(frame_indices(ceil(25 * seconds), seconds, max_frames=MAX_FRAMES))
        tokens = images * FRAME_TOKENS if video is None else video
        starts = np.arange(PIECE_TOKENS) * STRIDE * HOP
        padding = np.concatenate([starts >= samples for samples in piece_lengths(seconds)])
        return Layout.join(
            [
                Layout.of(Modality.IMAGE, tokens, frame=np.arange(tokens) // FRAME_TOKENS),
                Layout.of(Modality.AUDIO, len(padding), padding=padding)
                if audio is None
                else Layout.of(Modality.AUDIO, audio),
            ]
        )

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the decoder, without AltUp, LAuReL and per-layer inputs."""
        return gemma_shape(config)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text model."""
        return model.get_submodule("model.language_model")

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The vision and audio towers. Their embedders run for text, too, and are not included."""
        return tuple(model.get_submodule(f"model.{name}") for name in ("vision_tower", "audio_tower"))


def _layouts(image_id: int, audio_id: int, inputs: Mapping[str, Any]) -> Iterator[Layout]:
    """The layout of each prompt. An image or a piece of audio is a run of tokens between start and end marks."""
    masks = iter_rows(inputs, "input_features_mask")
    for ids in prompt_ids(inputs):
        image, audio = ids == image_id, ids == audio_id
        frame, _ = token_runs(image)
        number, _ = token_runs(audio)
        padding = np.zeros(len(ids), bool)
        for piece in range(number.max() + 1):
            run = number == piece
            if (mask := next(masks, None)) is not None:
                padding[run] = _silent(mask.astype(bool), int(run.sum()))
        yield layout_from_masks(np.zeros_like(image), audio, image=image, frame=frame, padding=padding)


def _silent(mask: Bool[np.ndarray, " mels"], tokens: int) -> Bool[np.ndarray, " tokens"]:
    """Which tokens of a piece are padding, from the mask of its mel frames: the first one of a token decides."""
    first = np.arange(tokens) * STRIDE
    return (first >= len(mask)) | ~mask[np.minimum(first, len(mask) - 1)]
