"""What the rest of fastav must know about Gemma 3n."""

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastav.adapter import Request
from fastav.errors import MissingTrack
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.models._adapters import of_places, prompts_of, rows_of, with_seconds
from fastav.models._gemma import PIECE, RATE, gemma_plan, gemma_shape, lengths, pieces, runs
from fastav.models._official import CHANNELS_LAST, OfficialAdapter, Row, refuse_written_placeholders, rendered
from fastav.models._pictures import frame_indices
from fastav.plan import Keep, Plan, Tokens
from fastav.presets import plus, trim

MOST = 32  # frames, of which there is one for every second begun
FRAME_TOKENS, PIECE_TOKENS = 256, 188
HOP, STRIDE = 160, 16  # samples between two mel frames, and mel frames of a token
PREFIX = 4  # tokens before the clip: the start of the text and who speaks
EXAMPLE_SECONDS = 30.0


class Gemma3nAdapter(OfficialAdapter):
    """Gemma 3n: frames of a video as images, its sound in pieces of 30 s, the question.

    It takes no videos; a clip is one image for every second begun, at most 32, each in the middle of its part of the
    clip. A piece of sound is always 188 tokens, of which those beyond the sound are padding, and it is always filled up
    to 30 s before it is heard, so that one clip's answer does not depend on the length of another's sound.

    The paper has no settings for it. The preset `fastav` keeps, as the paper does for VideoLLaMA2, whose video stands
    before its sound, too, the first 10 audio tokens and all images. Of its 35 layers the last 15 read the keys and
    values of earlier ones, and every fifth attends to all tokens. So the cut by position enters layer 10, the middle
    one of those with keys and values of their own, and the one fine cut layer 15; see `gemma_plan`.
    """

    name = "gemma3n"
    stacks_hidden_states = True
    architectures = frozenset({"Gemma3nForConditionalGeneration"})
    checkpoint = "google/gemma-3n-E4B-it"
    presets: ClassVar[Mapping[str, Plan]] = {
        "fastav": gemma_plan(Keep(audio=Tokens(10)), first=10, later=15, images=False),
        "fastav-plus": plus(),
        "fastav-trim": trim(),
    }
    config_class = "Gemma3nConfig"
    model_class = "Gemma3nForConditionalGeneration"
    processor_class = "Gemma3nProcessor"
    packages = ("timm", "torchvision")
    release: ClassVar[Mapping[str, Any]] = {}  # the defaults of transformers are its own

    def row(self, processor: Any, request: Request) -> Row:
        """The processor's tensors for one request, and its layout.

        Raises: MissingTrack, MediaError.
        """
        refuse_written_placeholders(request.question, [processor.image_token, processor.audio_token])
        seen, heard = request.tracks
        if not (seen or heard):
            raise MissingTrack(f"{request.clip.name} has neither a video nor an audio track")
        track = request.clip.require_video() if seen else None
        indices = [] if track is None else frame_indices(track.frames, track.duration, most=MOST)
        sounds = pieces(request.clip) if heard else []
        content = [{"type": "image"} for _ in indices] + [{"type": "audio"} for _ in sounds]
        inputs = processor(
            text=[rendered(processor, [*content, {"type": "text", "text": request.question}])],
            images=None if track is None else list(track.read(indices)),
            images_kwargs={"input_data_format": CHANNELS_LAST},
            audio=sounds or None,
            audio_kwargs={"padding": "max_length"},
            return_tensors="pt",
        )
        (layout,) = _layouts(processor.image_token_id, processor.audio_token_id, inputs)
        second, image, audio = np.array(layout.second), layout.frame >= 0, layout.modality == Modality.AUDIO
        if track is not None:
            second[image] = track.seconds(indices)[layout.frame[image]]
        number, place = runs(audio)
        if heard:
            start = request.clip.require_audio().start
            second[audio] = start + (number[audio] * PIECE + place[audio] * STRIDE * HOP) / RATE
        return Row(dict(inputs), with_seconds(layout, second))

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        known: Any = config
        return tuple(_layouts(known.image_token_id, known.audio_token_id, inputs))

    def example(
        self,
        config: PreTrainedConfig,
        *,
        seconds: float | int | None = None,
        audio: int | None = None,
        video: int | None = None,
        text: int,
    ) -> Layout:
        """A typical prompt: some text, images of a clip of 30 s, its sound, the rest of the text."""
        seconds = EXAMPLE_SECONDS if seconds is None else seconds
        images = len(frame_indices(ceil(25 * seconds), seconds, most=MOST))
        tokens = images * FRAME_TOKENS if video is None else video
        starts = np.arange(PIECE_TOKENS) * STRIDE * HOP
        padding = np.concatenate([starts >= samples for samples in lengths(seconds)])
        before = min(PREFIX, text)
        return Layout.join(
            [
                Layout.of(Modality.TEXT, before),
                Layout.of(Modality.IMAGE, tokens, frame=np.arange(tokens) // FRAME_TOKENS),
                Layout.of(Modality.AUDIO, len(padding), padding=padding)
                if audio is None
                else Layout.of(Modality.AUDIO, audio),
                Layout.of(Modality.TEXT, text - before),
            ]
        )

    def attending_hidden(self, hidden: Tensor) -> Float[Tensor, "batch tokens features"]:
        """AltUp: the first of a token's hidden states attends, of [states, batch, tokens, features]."""
        return hidden[0]

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the decoder, without what each layer adds of its own (AltUp, LAuReL, per-layer inputs)."""
        return gemma_shape(config)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text model."""
        return model.get_submodule("model.language_model")

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The towers for images and sound. What embeds their tokens is run for text, too, and not counted."""
        return tuple(model.get_submodule(f"model.{name}") for name in ("vision_tower", "audio_tower"))


def _layouts(image_id: int, audio_id: int, inputs: Mapping[str, Any]) -> Iterator[Layout]:
    """An image, and a piece of sound, is a run of its tokens, between marks of its start and end."""
    sounds = rows_of(inputs, "input_features_mask")
    for ids in prompts_of(inputs):
        image, audio = ids == image_id, ids == audio_id
        frame, _ = runs(image)
        number, _ = runs(audio)
        padding = np.zeros(len(ids), bool)
        for piece in range(number.max() + 1):
            run = number == piece
            if (mask := next(sounds, None)) is not None:
                padding[run] = _silent(mask.astype(bool), int(run.sum()))
        yield of_places(np.zeros_like(image), audio, image=image, frame=frame, padding=padding)


def _silent(mask: Bool[np.ndarray, " mels"], tokens: int) -> Bool[np.ndarray, " tokens"]:
    """Which tokens of a piece of sound lie beyond it, by its mel frames' mask: each stands for its first mel frame."""
    first = np.arange(tokens) * STRIDE
    return (first >= len(mask)) | ~mask[np.minimum(first, len(mask) - 1)]
