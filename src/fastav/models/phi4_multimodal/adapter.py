"""What the rest of fastav must know about Phi-4-multimodal."""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from jaxtyping import Bool, Int
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import Prepared, Request
from fastav.errors import MediaError
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.models._adapters import of_places, prompts_of, qwen2_shape, rows_of, with_seconds
from fastav.models._checkpoint import HUB_OPTIONS, readable
from fastav.models._official import CHANNELS_LAST, OfficialAdapter, Row, refuse_written_placeholders, rendered
from fastav.models._pictures import frame_indices
from fastav.models.phi4_multimodal.lora import merge
from fastav.plan import Keep, Plan, Tokens
from fastav.presets import fastav, plus, trim

MOST = 16  # frames, of which there is one for every second begun
RATE = 16_000
WINDOW, HOP, STRIDE = 400, 160, 8  # samples of a mel frame, samples between two, and mel frames of a token
SIDE = 16  # tokens a side of a crop, which the processor counts on
PREFIX = 2  # tokens before the clip: who speaks
EXAMPLE_SECONDS = 30.0
REVISION = "refs/pr/70"  # where the weights in transformers' own format are
VISION = "vision-lora"
LENGTHS = "audio_frames"  # of each sound; not an argument of forward


class Phi4MultimodalAdapter(OfficialAdapter):
    """Phi-4-multimodal: frames of a video as images, then its sound.

    It takes no videos; a clip is one image for every second begun, at most 16, each in the middle of its part of the
    clip. An image is one crop, and once more the whole.

    The decoder's changes for vision, which the checkpoint keeps apart, are added to its weights when it is loaded: the
    authors use them whenever there is an image, also with sound. Sound alone needs other changes; it is refused.

    The paper has no settings for it; the preset `fastav` does as the paper does for VideoLLaMA2, whose video stands
    before its sound, too: it keeps the first 10 tokens of sound and all images at the middle layer.
    """

    name = "phi4-multimodal"
    cache_limit = " (its code does so where prompt and answer pass 4,096 tokens)"
    architectures = frozenset({"Phi4MultimodalForCausalLM"})
    checkpoint = "microsoft/Phi-4-multimodal-instruct"
    revision = REVISION
    presets: ClassVar[Mapping[str, Plan]] = {
        "fastav": fastav(Keep(audio=Tokens(10))),
        "fastav-plus": plus(),
        "fastav-trim": trim(),
    }
    config_class = "Phi4MultimodalConfig"
    model_class = "Phi4MultimodalForCausalLM"
    processor_class = "Phi4MultimodalProcessor"
    release: ClassVar[Mapping[str, Any]] = {
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    }

    def config(self, source: str | None = None) -> PreTrainedConfig:
        """The configuration in a local folder or hub id; of the release, without any download, if None."""
        if source is None or source != self.checkpoint:
            return super().config(source)
        with readable(source):
            return transformers.Phi4MultimodalConfig.from_pretrained(source, revision=REVISION)

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Model (in evaluation mode), with its changes for vision, and processor from a local folder or a hub id.

        Of the released hub id, the revision in transformers' own format is taken unless `options` names another.

        Raises: CheckpointError if keys are missing, left over, or of another shape, files cannot be read, or there is
        no folder of changes for vision in a checkpoint whose weights do not hold them yet.
        """
        if source == self.checkpoint:
            options = {"revision": self.revision, **options}
        model, processor = super().load(source, **options)
        if getattr(model.config, "merged_adapter", None) != VISION:
            with readable(f"{source}/{VISION}"):
                merge(model, source, VISION, {name: options[name] for name in HUB_OPTIONS if name in options})
            model.config.merged_adapter = VISION  # saved with the weights, so that they are not added twice
        return model, processor

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests.

        Raises: CheckpointError for another model's processor; MissingTrack for a clip without a track that is asked
        for; MediaError for sound alone, or too little of it.
        """
        prepared = super().prepare(processor, requests)
        inputs = dict(prepared.inputs)
        lengths = inputs.pop(LENGTHS, None)
        if lengths is not None and len(lengths) > 1:  # as the processor does; a single sound has no mask
            inputs["audio_attention_mask"] = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        return Prepared(inputs=inputs, layouts=prepared.layouts)

    def row(self, processor: Any, request: Request) -> Row:
        """The processor's tensors for one request, the length of its sound's features, and its layout."""
        refuse_written_placeholders(request.question, [processor.image_token, processor.audio_token])
        seen, heard = request.tracks
        if not seen:
            raise MediaError(
                f"{self.name} cannot answer about sound alone: its decoder is set for images, with or without sound",
                "show the video too: use='both' (--use both)",
            )
        track = request.clip.require_video()
        indices = frame_indices(track.frames, track.duration, most=MOST)
        content = processor.image_token * len(indices) + processor.audio_token * heard + request.question
        inputs = processor(
            text=[rendered(processor.tokenizer, content)],  # the processor loses its template when it is read
            images=list(track.read(indices)),
            audio=[self._sound(request)] if heard else None,
            images_kwargs={"dynamic_hd": 1, "input_data_format": CHANNELS_LAST},
            audio_kwargs={"sampling_rate": RATE},
            return_tensors="pt",
        )
        if heard:
            inputs[LENGTHS] = torch.tensor([inputs["audio_input_features"].shape[1]])
        (layout,) = _layouts(processor.image_token_id, processor.audio_token_id, inputs)
        second, audio = np.array(layout.second), layout.modality == Modality.AUDIO
        second[layout.frame >= 0] = track.seconds(indices)[layout.frame[layout.frame >= 0]]
        if heard:
            second[audio] = request.clip.require_audio().start + np.arange(audio.sum()) * STRIDE * HOP / RATE
        return Row(dict(inputs), with_seconds(layout, second))

    def _sound(self, request: Request) -> np.ndarray:
        sound = np.asarray(request.clip.require_audio().read(RATE))
        if len(sound) < WINDOW:
            raise MediaError(f"{request.clip.name} has under 25 ms of sound", "ask with use='video' (--use video)")
        return sound

    def layouts(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
        """The layout of each row, from the arguments of `forward` alone; seconds are unknown."""
        known: Any = config
        return tuple(_layouts(known.vision_config.image_token_id, known.audio_config.audio_token_id, inputs))

    def example(
        self,
        config: PreTrainedConfig,
        *,
        seconds: float | int | None = None,
        audio: int | None = None,
        video: int | None = None,
        text: int,
    ) -> Layout:
        """A typical prompt: some text, 16 images of a clip of 30 s at 1280 x 720, its sound, the rest of the text."""
        seconds = EXAMPLE_SECONDS if seconds is None else seconds
        empty = picture_padding(rows=1, columns=1, height=SIDE * 9 // 16, width=SIDE)
        tokens = len(frame_indices(ceil(25 * seconds), seconds, most=MOST)) * len(empty) if video is None else video
        before = min(PREFIX, text)
        return Layout.join(
            [
                Layout.of(Modality.TEXT, before),
                Layout.of(
                    Modality.IMAGE,
                    tokens,
                    frame=np.arange(tokens) // len(empty),
                    padding=np.resize(empty, tokens),
                ),
                Layout.of(Modality.AUDIO, _audio_tokens(round(seconds * RATE)) if audio is None else audio),
                Layout.of(Modality.TEXT, text - before),
            ]
        )

    def shape(self, config: PreTrainedConfig) -> DecoderShape:
        """The dimensions of the Phi-4-mini decoder."""
        return qwen2_shape(config)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The model without its head."""
        return model.get_submodule("model")

    def encoders(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """SigLIP and the conformer, with their projectors."""
        return (model.get_submodule("model.embed_tokens_extend"),)


def picture_padding(*, rows: int, columns: int, height: int, width: int) -> Bool[np.ndarray, " tokens"]:
    """Which tokens of an image show nothing but the white that fills its last crops.

    rows, columns: its crops. height, width: its tokens in all crops together, without those of the filling.
    An image is these tokens with one more at the end of each line, one that separates, and the whole once more as one
    crop with its filling.
    """
    empty = np.zeros((SIDE, SIDE + 1), bool)
    empty[np.arange(SIDE) * rows >= height] = True
    empty[:, :SIDE][:, np.arange(SIDE) * columns >= width] = True
    return np.concatenate([np.zeros(height * (width + 1) + 1, bool), empty.ravel()])


def _picture_padding(size: Int[np.ndarray, " 2"], mask: np.ndarray, crop: int) -> Bool[np.ndarray, " tokens"]:
    """As `picture_padding`, from `image_sizes` and `image_attention_mask`, whose first crop is the whole."""
    rows, columns = (int(pixels) // crop for pixels in size)
    kept = mask[1 : rows * columns + 1, ::2, ::2].reshape(rows, columns, SIDE, SIDE)
    height, width = kept[:, 0, :, 0].sum(), kept[0, :, 0].sum()
    return picture_padding(rows=rows, columns=columns, height=int(height), width=int(width))


def _layouts(image_id: int, audio_id: int, inputs: Mapping[str, Any]) -> Iterator[Layout]:
    pixels = inputs.get("image_pixel_values")
    crop = 1 if pixels is None else pixels.shape[-1]
    images = zip(rows_of(inputs, "image_sizes"), rows_of(inputs, "image_attention_mask"), strict=True)
    pictures = (_picture_padding(size, mask, crop) for size, mask in images)
    for ids in prompts_of(inputs):
        image, audio = ids == image_id, ids == audio_id
        frame, padding = np.full(len(ids), -1), np.zeros(len(ids), bool)
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < image.sum() and (part := next(pictures, None)) is not None:
            parts.append(part)
        if parts and sum(map(len, parts)) == image.sum():
            frame[image] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
            padding[image] = np.concatenate(parts)
        yield of_places(np.zeros_like(image), audio, image=image, frame=frame, padding=padding)


def _audio_tokens(samples: int) -> int:
    """How many tokens so much sound gives."""
    return ceil(((samples - WINDOW) // HOP + 1) / STRIDE)
