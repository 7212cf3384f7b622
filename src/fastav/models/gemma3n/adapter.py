"""The adapter of Gemma 3n."""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, isqrt
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastav.budgets import Tokens
from fastav.errors import MissingTrack
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.messages import Media
from fastav.models._adapters import iter_rows, prompt_ids
from fastav.models._boxes import Boxes, grid_boxes, placed
from fastav.models._frame_sampling import frame_indices
from fastav.models._gemma import PIECE, RATE, audio_pieces, gemma_plan, gemma_shape, piece_lengths, token_runs
from fastav.models._grids import MediaTokens, image_tokens
from fastav.models._official import CHANNELS_LAST, OfficialAdapter
from fastav.models._pieces import Pieces, Sample, follows_frame
from fastav.plan import Keep, Plan
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

    def sample(self, processor: Any, media: Media) -> Sample:
        """Frames of a video as images and its sound in pieces, sound in pieces, or an image.

        Raises: MissingTrack, MediaError.
        """
        has_video, has_audio = media.tracks
        if not (has_video or has_audio):
            raise MissingTrack(f"{media.name} has neither a video nor an audio track")
        indices, track = [], None
        if has_video:
            track = media.clip.require_video()
            indices = frame_indices(track.frames, track.duration, max_frames=MAX_FRAMES)
        parts, sounds, start = [{"type": "image"} for _ in indices], [], 0.0
        if has_audio:
            sounds, start = audio_pieces(media.clip, media.name), media.clip.require_audio().start
        return Sample(
            parts=[*parts, *({"type": "audio"} for _ in sounds)],
            images=[] if track is None else list(track.read(indices)),
            sounds=sounds,
            seconds=np.zeros(0) if track is None else track.seconds(indices),
            start=start,
        )

    def process(self, processor: Any, text: str, samples: Sequence[Sample]) -> dict[str, Any]:
        """The processor's tensors for a rendered conversation and its media."""
        inputs = processor(
            text=[text],
            images=[image for sample in samples for image in sample.images] or None,
            images_kwargs={"input_data_format": CHANNELS_LAST},
            audio=[sound for sample in samples for sound in sample.sounds] or None,
            audio_kwargs={"padding": "max_length"},
            return_tensors="pt",
        )
        return dict(inputs)

    def placeholders(self, processor: Any) -> Sequence[str]:
        """The words that stand for images and sound."""
        return [processor.image_token, processor.audio_token]

    def media_tokens(self, processor: Any) -> MediaTokens:
        """The ids of media tokens, from the processor."""
        return image_tokens(processor.image_token_id, processor.audio_token_id)

    def config_tokens(self, config: Any) -> MediaTokens:
        """The ids of media tokens, from the model's configuration."""
        return image_tokens(config.image_token_id, config.audio_token_id)

    def pieces(self, media_tokens: MediaTokens, inputs: Mapping[str, Any]) -> Iterator[Pieces]:
        """The media tokens of each prompt.  An image or a piece of audio is a run of tokens between marks.

        The tokens of an image are a square grid over all of it: it is resized to a square.
        """
        masks = iter_rows(inputs, "input_features_mask")
        for ids in prompt_ids(inputs):
            audio, padding = token_runs(ids == media_tokens.audio), np.zeros(len(ids), bool)
            for piece in range(audio.max() + 1):
                run = audio == piece
                if (mask := next(masks, None)) is not None:
                    padding[run] = _silent(mask.astype(bool), int(run.sum()))
            image = token_runs(ids == media_tokens.image)
            yield Pieces(
                video=np.full(len(ids), -1),
                image=image,
                audio=audio,
                frame=np.full(len(ids), -1),
                joins=follows_frame,
                padding=padding,
                box=placed(_square_boxes(image), image >= 0),
                framed_images=True,
            )

    def audio_seconds(
        self, sound: Int[np.ndarray, " tokens"], index: Int[np.ndarray, " tokens"]
    ) -> Float[np.ndarray, " tokens"]:
        """Start of audio tokens in their track, in seconds."""
        return (sound * PIECE + index * STRIDE * HOP) / RATE

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


def _square_boxes(image: Int[np.ndarray, " tokens"]) -> Boxes:
    """The boxes of the tokens of all images, in order."""
    counts = np.bincount(image[image >= 0])
    return np.concatenate([np.zeros((0, 4), np.float32), *(grid_boxes(isqrt(n), isqrt(n)) for n in counts)])


def _silent(mask: Bool[np.ndarray, " mels"], tokens: int) -> Bool[np.ndarray, " tokens"]:
    """Which tokens of a piece are padding, from the mask of its mel frames: the first one of a token decides."""
    first = np.arange(tokens) * STRIDE
    return (first >= len(mask)) | ~mask[np.minimum(first, len(mask) - 1)]
