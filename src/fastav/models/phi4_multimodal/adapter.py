"""The adapter of Phi-4-multimodal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.adapter import Prepared, PreparedTurn, Transcript
from fastav.budgets import Tokens
from fastav.errors import MediaError
from fastav.flops import DecoderShape
from fastav.layout import Layout, Modality
from fastav.messages import Kind, Media
from fastav.models._adapters import iter_rows, prompt_ids, qwen2_shape
from fastav.models._boxes import Boxes, grid_boxes, placed, with_line_ends
from fastav.models._checkpoint import HUB_OPTIONS, readable
from fastav.models._frame_sampling import frame_indices
from fastav.models._grids import MediaTokens, image_tokens
from fastav.models._official import CHANNELS_LAST, PICTURE_SIZES, OfficialAdapter, concatenate, render_chat
from fastav.models._pieces import Pieces, Sample, follows_frame, pieces_of_lengths
from fastav.models.phi4_multimodal.lora import merge
from fastav.plan import Keep, Plan
from fastav.presets import fastav, plus, trim
from fastav.request import Request

MAX_FRAMES = 16  # one per started second
RATE = 16_000
WINDOW, HOP, STRIDE = 400, 160, 8  # samples per mel frame, samples between mel frames, and mel frames per token
SIDE = 16  # tokens per side of a crop, which is fixed in the processor
EXAMPLE_SECONDS = 30.0
REVISION = "refs/pr/70"  # the weights in transformers' format
VISION = "vision-lora"
LENGTHS = "audio_frames"  # an input of one prompt that is not an argument of `forward`


class Phi4MultimodalAdapter(OfficialAdapter):
    """Phi-4-multimodal: frames of a video as images, then the audio.

    The model takes no videos: a clip becomes one image per started second, at most 16, each from the middle of its part
    of the clip. An image is encoded as one crop, and a second time as a whole.

    The decoder's vision LoRA, a separate folder of the checkpoint, is merged into the weights on loading: the authors
    use it whenever there is an image, with or without audio. Audio alone needs another LoRA and is refused.

    The paper has no settings for this model. The preset `fastav` keeps the first 10 audio tokens and all images at the
    middle layer, as the paper does for VideoLLaMA2, where video also comes before audio.
    """

    name = "phi4-multimodal"
    prefix = 2  # the role
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
        """The configuration in a local folder or hub id; None for the released model's, without any download."""
        if source is None or source != self.checkpoint:
            return super().config(source)
        with readable(source):
            return transformers.Phi4MultimodalConfig.from_pretrained(source, revision=REVISION)

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Model (in evaluation mode), with its vision LoRA merged, and processor from a local folder or a hub id.

        For the released hub id, the revision in transformers' format is loaded unless `options` names another.

        Raises: CheckpointError if keys are missing, unexpected, or of another shape, if files cannot be read, or if the
        checkpoint's weights do not include the vision LoRA and it has no folder with it.
        """
        if source == self.checkpoint:
            options = {"revision": self.revision, **options}
        model, processor = super().load(source, **options)
        if getattr(model.config, "merged_adapter", None) != VISION:
            with readable(f"{source}/{VISION}"):
                merge(model, source, VISION, {name: options[name] for name in HUB_OPTIONS if name in options})
            model.config.merged_adapter = VISION  # saved with the weights, so that the LoRA is not merged twice
        return model, processor

    def prepare(self, processor: ProcessorMixin, requests: Sequence[Request]) -> Prepared:
        """Decode, sample and tokenize a batch of requests.

        Raises: CheckpointError for another model's processor; MissingTrack for a clip without a track that its request
        requires; MediaError for audio without video, or less than 25 ms of audio.
        """
        prepared = super().prepare(processor, requests)
        return replace(prepared, inputs=_with_audio_mask(prepared.inputs))

    def prepare_turn(self, processor: ProcessorMixin, request: Request, earlier: Transcript) -> PreparedTurn:
        """Decode, sample and tokenize the new messages of a conversation.  Raises: as `prepare`."""
        turn = super().prepare_turn(processor, request, earlier)
        return replace(turn, inputs=_with_audio_mask(turn.inputs))

    def sample(self, processor: Any, media: Media) -> Sample:
        """Frames of a video as images, with its sound; sound; or an image.

        Raises: MediaError for less than 25 ms of audio.
        """
        has_video, has_audio = media.tracks
        indices, track = [], None
        if has_video:
            track = media.clip.require_video()
            indices = frame_indices(track.frames, track.duration, max_frames=MAX_FRAMES)
        return Sample(
            parts=[{"type": "text", "text": processor.image_token * len(indices) + processor.audio_token * has_audio}],
            images=[] if track is None else list(track.read(indices)),
            sounds=[_waveform(media)] if has_audio else [],
            is_image=media.kind is Kind.IMAGE,
            seconds=np.zeros(0) if track is None else track.seconds(indices),
            start=media.clip.require_audio().start if has_audio else 0.0,
        )

    def transcript(
        self, processor: Any, request: Request, samples: Sequence[Sample], earlier: Transcript
    ) -> tuple[Transcript, str]:
        """The conversation with new messages, and the text that they add.

        Raises: MediaError for sound without a picture, and for images beside videos.
        """
        kinds = {media.kind for media in request.media if media.tracks[0]}
        if request.media and not kinds:
            raise MediaError(
                f"{self.name} cannot answer about audio alone: its decoder has the vision LoRA merged",
                "use the video too: use='both' (--use both)",
            )
        if kinds == {Kind.IMAGE, Kind.VIDEO}:
            raise MediaError(
                f"{self.name} cannot take images beside a video: its processor cuts all pictures of a prompt alike",
                "ask about the images, or about the video",
            )
        return super().transcript(processor, request, samples, earlier)

    def render(self, processor: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        """Messages, rendered by the tokenizer's chat template: a reloaded processor lacks it."""
        flat = [
            {**message, "content": content if isinstance(content, str) else "".join(part["text"] for part in content)}
            for message in messages
            for content in [message["content"]]
        ]
        return render_chat(processor.tokenizer, flat, tools)

    def process(self, processor: Any, text: str, samples: Sequence[Sample]) -> dict[str, Any]:
        """The processor's tensors for a rendered conversation and its media.

        Frames of a video are encoded as one crop each, images as the processor's settings say.
        """
        images = [image for sample in samples for image in sample.images]
        sounds = [sound for sample in samples for sound in sample.sounds]
        has_frames = any(sample.images and not sample.is_image for sample in samples)
        inputs = dict(
            processor(
                text=[text],
                images=images or None,
                audio=sounds or None,
                images_kwargs={"input_data_format": CHANNELS_LAST, **({"dynamic_hd": 1} if has_frames else {})},
                audio_kwargs={"sampling_rate": RATE},
                return_tensors="pt",
            )
        )
        if sounds:
            inputs.pop("audio_attention_mask", None)
            features = [
                processor.audio_processor([sound], sampling_rate=RATE, return_tensors="pt")["audio_input_features"]
                for sound in sounds
            ]
            inputs |= concatenate([{"audio_input_features": one} for one in features])
            inputs[LENGTHS] = torch.tensor([one.shape[1] for one in features])
        return inputs

    def placeholders(self, processor: Any) -> Sequence[str]:
        """The words that stand for images and sound."""
        return [processor.image_token, processor.audio_token]

    def media_tokens(self, processor: Any) -> MediaTokens:
        """The ids of media tokens, from the processor."""
        return image_tokens(processor.image_token_id, processor.audio_token_id)

    def config_tokens(self, config: Any) -> MediaTokens:
        """The ids of media tokens, from the model's configuration."""
        return image_tokens(config.vision_config.image_token_id, config.audio_config.audio_token_id)

    def pieces(self, media_tokens: MediaTokens, inputs: Mapping[str, Any]) -> Iterator[Pieces]:
        """The media tokens of each prompt.  Boxes are known with `PICTURE_SIZES` only."""
        images = _images(inputs)
        sounds = (int(n) for n in iter_rows(inputs, "audio_embed_sizes"))
        for ids in prompt_ids(inputs):
            is_image, padding = ids == media_tokens.image, np.zeros(len(ids), bool)
            parts, boxes = list[np.ndarray](), [np.zeros((0, 4), np.float32)]
            while sum(map(len, parts)) < is_image.sum() and (image := next(images, None)) is not None:
                parts.append(image[0])
                boxes.append(image[1])
            if parts and sum(map(len, parts)) == is_image.sum():
                padding[is_image] = np.concatenate(parts)
            yield Pieces(
                video=np.full(len(ids), -1),
                image=pieces_of_lengths(is_image, iter(map(len, parts))),
                audio=pieces_of_lengths(ids == media_tokens.audio, sounds),
                frame=np.full(len(ids), -1),
                joins=follows_frame,
                padding=padding,
                box=placed(np.concatenate(boxes), is_image),
                framed_images=bool(parts),
            )

    def audio_seconds(
        self, sound: Int[np.ndarray, " tokens"], index: Int[np.ndarray, " tokens"]
    ) -> Float[np.ndarray, " tokens"]:
        """Start of audio tokens in their track, in seconds."""
        return index * STRIDE * HOP / RATE

    def example_clip(
        self, config: PreTrainedConfig, seconds: float | None, audio: int | None, video: int | None
    ) -> Layout:
        """Images of a 1280 x 720 clip (30 s unless `seconds` is set), then its audio."""
        seconds = EXAMPLE_SECONDS if seconds is None else seconds
        padding = image_padding(rows=1, columns=1, height=SIDE * 9 // 16, width=SIDE)
        tokens = (
            len(frame_indices(ceil(25 * seconds), seconds, max_frames=MAX_FRAMES)) * len(padding)
            if video is None
            else video
        )
        return Layout.join(
            [
                Layout.of(
                    Modality.IMAGE,
                    tokens,
                    frame=np.arange(tokens) // len(padding),
                    padding=np.resize(padding, tokens),
                ),
                Layout.of(Modality.AUDIO, _audio_tokens(round(seconds * RATE)) if audio is None else audio),
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


def image_padding(*, rows: int, columns: int, height: int, width: int) -> Bool[np.ndarray, " tokens"]:
    """Which tokens of an image are padding: they cover only the white that fills up the image to whole crops.

    rows, columns: numbers of crops. height, width: tokens of the picture in all crops together, without padding.
    An image is these tokens with one more at the end of each line, then one separator, then the whole image as one
    crop with its padding.
    """
    padding = np.zeros((SIDE, SIDE + 1), bool)
    padding[np.arange(SIDE) * rows >= height] = True
    padding[:, :SIDE][:, np.arange(SIDE) * columns >= width] = True
    return np.concatenate([np.zeros(height * (width + 1) + 1, bool), padding.ravel()])


def image_boxes(*, rows: int, columns: int, height: int, width: int, picture: tuple[int, int]) -> Boxes:
    """The boxes of an image's tokens, in the order of `image_padding`, whose arguments these are.

    picture: height and width of the image before it is scaled to touch two sides of the crops; the rest, at the bottom
    or on the right, is white.
    """
    scale = min(rows / picture[0], columns / picture[1])  # crops per pixel
    past = rows / (scale * picture[0]), columns / (scale * picture[1])  # what all crops show, in pictures
    high, wide = height / (rows * SIDE) * past[0], width / (columns * SIDE) * past[1]
    crops = with_line_ends(grid_boxes(height, width, height=high, width=wide), height)
    whole = with_line_ends(grid_boxes(SIDE, SIDE, height=past[0], width=past[1]), SIDE)
    return np.concatenate([crops, np.full((1, 4), np.nan, np.float32), whole])


def _images(inputs: Mapping[str, Any]) -> Iterator[tuple[Bool[np.ndarray, " tokens"], Boxes]]:
    """Of each image: `image_padding` and `image_boxes`, from `image_sizes` and `image_attention_mask`.

    The mask's first crop is the whole image. Boxes are NaN without `PICTURE_SIZES`.
    """
    pixels = inputs.get("image_pixel_values")
    crop, pictures = 1 if pixels is None else pixels.shape[-1], iter(inputs.get(PICTURE_SIZES, ()))
    for size, mask in zip(iter_rows(inputs, "image_sizes"), iter_rows(inputs, "image_attention_mask"), strict=True):
        rows, columns = (int(pixels) // crop for pixels in size)
        is_picture = mask[1 : rows * columns + 1, ::2, ::2].reshape(rows, columns, SIDE, SIDE)
        height, width = int(is_picture[:, 0, :, 0].sum()), int(is_picture[0, :, 0].sum())
        padding = image_padding(rows=rows, columns=columns, height=height, width=width)
        boxes = np.full((len(padding), 4), np.nan, np.float32)
        if (picture := next(pictures, None)) is not None:
            boxes = image_boxes(rows=rows, columns=columns, height=height, width=width, picture=picture)
        yield padding, boxes


def _with_audio_mask(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `forward`, with a mask of the audio if there are several tracks; one has none in the processor."""
    inputs = dict(inputs)
    lengths = inputs.pop(LENGTHS, None)
    if lengths is not None and len(lengths) > 1:
        inputs["audio_attention_mask"] = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return inputs


def _waveform(media: Media) -> np.ndarray:
    waveform = np.asarray(media.clip.require_audio().read(RATE))
    if len(waveform) < WINDOW:
        raise MediaError(f"{media.name} has less than 25 ms of audio", "ask with use='video' (--use video)")
    return waveform


def _audio_tokens(samples: int) -> int:
    """The number of tokens of audio of this many samples."""
    return ceil(((samples - WINDOW) // HOP + 1) / STRIDE)
