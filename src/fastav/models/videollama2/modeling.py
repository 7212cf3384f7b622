"""VideoLLaMA2.1-7B-AV: SigLIP and BEATs in front of a Qwen2 decoder. Parameters have the original's names."""

import os
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList, Qwen2Model, SiglipVisionModel
from transformers import initialization as init
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2PreTrainedModel, Qwen2RotaryEmbedding
from transformers.utils.generic import can_return_tuple

from fastav.errors import MediaError, UnsupportedModel
from fastav.models.videollama2 import loading
from fastav.models.videollama2.beats import Beats, BeatsAttention, PositionConv
from fastav.models.videollama2.configuration import VideoLlama2Config
from fastav.models.videollama2.connector import StcConnector, mlp

MEDIA = ("pixel_values_videos", "input_features", "feature_attention_mask")


class VisionTower(nn.Module):
    """SigLIP up to the selected layer. What comes after it is part of the checkpoint but is not computed."""

    def __init__(self, config: VideoLlama2Config) -> None:
        super().__init__()
        layers, select = config.vision_config.num_hidden_layers, config.mm_vision_select_layer
        self.depth = select if select >= 0 else layers + 1 + select
        self.vision_tower = nn.ModuleDict({"vision_model": SiglipVisionModel(config.vision_config)})

    def forward(self, pixels: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames patches channels"]:
        """Patches in row-major order, before the last layer norm."""
        siglip = cast(SiglipVisionModel, self.vision_tower["vision_model"])
        hidden = siglip.embeddings(pixels)
        for layer in siglip.encoder.layers[: self.depth]:
            hidden = layer(hidden, None)
        return hidden


class VideoLlama2RotaryEmbedding(Qwen2RotaryEmbedding):
    """Qwen2's rotary tables, rounded to float16 in every dtype.

    The original always loads in float16 and so computes its tables in it, whatever the model is cast to later. Without
    the rounding, float32 logits of the tiny reference checkpoint are off by up to 0.07.
    """

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [batch, tokens, head], in the dtype of `x`."""
        cosine, sine = super().forward(x, position_ids)
        return cosine.half().to(x.dtype), sine.half().to(x.dtype)


class VideoLlama2PreTrainedModel(Qwen2PreTrainedModel):
    """What both models share: the configuration and how absent weights are drawn."""

    config: VideoLlama2Config
    config_class = VideoLlama2Config
    input_modalities = ["video", "audio", "text"]  # noqa: RUF012 (transformers' own declarations)
    _no_split_modules = ["Qwen2DecoderLayer", "SiglipEncoderLayer", "BeatsLayer", "Bottleneck"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PositionConv):
            init.zeros_(module.bias)
            init.ones_(module.weight_g)
            init.normal_(module.weight_v)
        elif isinstance(module, BeatsAttention):
            init.ones_(module.grep_a)


class VideoLlama2Model(VideoLlama2PreTrainedModel, Qwen2Model):
    """The encoders, their projectors and the decoder without its head."""

    def __init__(self, config: VideoLlama2Config) -> None:
        super().__init__(config)
        depth = re.fullmatch(r"mlp(\d+)x_gelu", config.mm_projector_a_type)
        if depth is None:
            raise UnsupportedModel(f"mm_projector_a_type must be 'mlp<n>x_gelu', got {config.mm_projector_a_type!r}")
        self.rotary_emb = VideoLlama2RotaryEmbedding(config)
        self.vision_tower = VisionTower(config)
        self.mm_projector = StcConnector(
            config.mm_hidden_size, config.hidden_size, config.stc_depth, config.stc_mlp_depth
        )
        self.audio_tower = Beats(config, config.beats)
        self.mm_projector_a = mlp(config.mm_hidden_size_a, config.hidden_size_a, int(depth[1]))
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """From a checkpoint of the whole model, whose head is read and dropped."""
        loaded = VideoLlama2ForConditionalGeneration.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return (loaded[0].model, loaded[1]) if isinstance(loaded, tuple) else loaded.model

    def get_video_features(
        self, pixel_values_videos: Float[Tensor, "videos frames 3 height width"]
    ) -> Float[Tensor, "videos tokens hidden"]:
        """The tokens of each video, in the order time, row, column."""
        pixels = pixel_values_videos.to(self.dtype)
        return self.mm_projector(self.vision_tower(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]))

    def get_audio_features(
        self, input_features: Float[Tensor, "audios rows bins"]
    ) -> Float[Tensor, "audios tokens hidden"]:
        """The tokens of each sound, in the order time, frequency."""
        return self.mm_projector_a(self.audio_tower(input_features.to(self.dtype)))

    def embed(
        self,
        input_ids: Int[Tensor, "batch prompt"],
        pixel_values_videos: Float[Tensor, "videos frames 3 height width"] | None = None,
        input_features: Float[Tensor, "audios rows bins"] | None = None,
    ) -> Float[Tensor, "batch prompt hidden"]:
        """The decoder's input: text embeddings, with the media's in place of their placeholders.

        Raises: MediaError if placeholders and media tokens differ in number (on the CPU, where looking costs nothing).
        """
        features = {}
        if pixel_values_videos is not None:
            features[self.config.video_token_id] = self.get_video_features(pixel_values_videos)
        if input_features is not None:
            features[self.config.audio_token_id] = self.get_audio_features(input_features)
        return self.merge(input_ids, features)

    def merge(
        self, input_ids: Int[Tensor, "batch prompt"], features: Mapping[int, Tensor]
    ) -> Float[Tensor, "batch prompt hidden"]:
        """Text embeddings, with each placeholder id's rows replaced by its features, in order.

        Raises: as `embed`.
        """
        text = input_ids
        for token in features:
            text = text.masked_fill(input_ids == token, 0)  # a placeholder need not be a row of the embedding
        merged = self.embed_tokens(text)
        for token, rows in features.items():
            place = input_ids == token
            if place.device.type == "cpu" and int(place.sum()) != rows.shape[0] * rows.shape[1]:
                raise MediaError(
                    f"the prompts hold {int(place.sum())} placeholders of id {token}, "
                    f"their media give {rows.shape[0]} x {rows.shape[1]} tokens",
                    "make the inputs with VideoLlama2Processor, or expand each placeholder to one id per token",
                )
            merged = merged.masked_scatter(place[..., None], rows.to(merged))
        return merged

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Encode, merge, and run Qwen2's own decoder on the merged embeddings.

        input_ids: [batch, prompt], one placeholder id per media token. pixel_values_videos: [videos, frames, 3, S, S].
        input_features: [audios, rows, bins]. feature_attention_mask: [audios, rows], True where a row holds sound;
        unused, for layouts. position_ids: counted from each row's first unmasked token, unless given.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed(input_ids, pixel_values_videos, input_features)
            input_ids = None
        if position_ids is None and inputs_embeds is not None and isinstance(attention_mask, Tensor):
            position_ids = positions(attention_mask, inputs_embeds.shape[1])
        decoder: Any = super()
        return decoder.forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class VideoLlama2ForConditionalGeneration(VideoLlama2PreTrainedModel, GenerationMixin):
    """VideoLLaMA2.1-7B-AV."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: VideoLlama2Config) -> None:
        super().__init__(config)
        self.model = VideoLlama2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, and nothing is left to chance: every key of the model and of the file must match.

        SigLIP's weights come from the checkpoint, or, if it has none, from where `mm_vision_tower` points.
        Raises: CheckpointError for unreadable files, and for missing, unexpected or mismatched keys.
        """
        with loading.readable(pretrained_model_name_or_path):
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                **{**kwargs, "ignore_mismatched_sizes": True},  # named by `complete` instead
            )
            model, info = loaded
            loading.complete(model, info, str(pretrained_model_name_or_path or ""))
        return (model, info) if output_loading_info else model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [batch, kept, vocab]; arguments as `VideoLlama2Model.forward`.

        labels: [batch, prompt], -100 where there is none (media and padding). logits_to_keep: only the last so many.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            input_features=input_features,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers' own; media are encoded in the first step only, unless there is no cache."""
        mixin: Any = super()
        inputs = mixin.prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        if use_cache and not is_first_iteration:
            for name in MEDIA:
                inputs.pop(name, None)
        return inputs

    def _get_logits_processor(
        self, *args: Any, input_ids_seq_length: int | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        """The original generates from embeddings, so its repetition penalty sees generated tokens only."""
        mixin: Any = super()
        processors = mixin._get_logits_processor(*args, input_ids_seq_length=input_ids_seq_length, **kwargs)
        for processor in processors:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor) and processor.prompt_ignore_length is None:
                processor.prompt_ignore_length = input_ids_seq_length
        return processors

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each prompt's media with the prompt; a row may have any number of them."""
        media = {name: kwargs.pop(name) for name in MEDIA if kwargs.get(name) is not None}
        mixin: Any = super()
        expanded, kwargs = mixin._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        if expand_size == 1 or input_ids is None:
            return expanded, kwargs | media
        for name, value in media.items():
            groups = value.split(self._media_per_row(name, value, input_ids))
            kwargs[name] = torch.cat([group for group in groups for _ in range(expand_size)])
        return expanded, kwargs

    def _media_per_row(self, name: str, value: Tensor, input_ids: Tensor) -> list[int]:
        scheme = self.config.scheme
        video = name == "pixel_values_videos"
        token, size = (
            (scheme.video_token_id, scheme.video_tokens(value.shape[1]))
            if video
            else (scheme.audio_token_id, scheme.audio_tokens)
        )
        return ((input_ids == token).sum(1) // size).tolist()


def positions(attention_mask: Tensor, last: int) -> Tensor | None:
    """Position ids [batch, last] of the last tokens under a mask [batch, prompt]; None for masks of another form."""
    if attention_mask.ndim != 2:
        return None
    counted = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
    return counted[:, -last:]
