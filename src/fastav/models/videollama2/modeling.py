"""VideoLLaMA2.1-7B-AV: SigLIP and BEATs in front of a Qwen2 decoder. Parameters have the original's names."""

from collections.abc import Mapping
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, Qwen2Model
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2PreTrainedModel, Qwen2RotaryEmbedding
from transformers.utils.generic import can_return_tuple

from fastav.cache_argument import as_argument, either_name
from fastav.models._checkpoint import HUB_OPTIONS, readable
from fastav.models._layer_outputs import output_flags, record_outputs
from fastav.models._layers import SiglipTower, mlp
from fastav.models._merging import encoded, merged
from fastav.models._native_configuration import mlp_depth
from fastav.models._native_modeling import MediaDecoder, NativeGeneration
from fastav.models.videollama2.beats import Beats, BeatsAttention, PositionConv
from fastav.models.videollama2.configuration import VideoLlama2Config
from fastav.models.videollama2.connector import StcConnector
from fastav.models.videollama2.loading import complete


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

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As transformers' own, under the names that parameters have here, which are the original's.

        transformers' `save_original_format` would give BEATs' `weight_g` and `weight_v` the names of PyTorch's
        parametrizations, which the original cannot read.
        """
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class VideoLlama2Model(MediaDecoder, VideoLlama2PreTrainedModel, Qwen2Model):
    """The encoders, their projectors and the decoder without its head. It loads its own save or the whole model's."""

    def __init__(self, config: VideoLlama2Config) -> None:
        super().__init__(config)
        layers, select = config.vision_config.num_hidden_layers, config.mm_vision_select_layer
        self.rotary_emb = VideoLlama2RotaryEmbedding(config)
        self.vision_tower = SiglipTower(config.vision_config, select if select >= 0 else layers + 1 + select)
        self.mm_projector = StcConnector(
            config.mm_hidden_size, config.hidden_size, config.stc_depth, config.stc_mlp_depth
        )
        self.audio_tower = Beats(config, config.beats)
        depth = mlp_depth(config, "mm_projector_a_type")
        self.mm_projector_a = mlp(config.mm_hidden_size_a, config.hidden_size_a, depth)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """From its own save, or from a checkpoint of the whole model, whose head is read and dropped.

        A `state_dict` without a checkpoint may be of either, too. Of the whole model's names transformers cannot strip
        `model.`: it takes BEATs' `weight_g` and `weight_v` for older names of other parameters.
        """
        source, hub = pretrained_model_name_or_path, {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        with readable(source):
            config = kwargs.get("config") or VideoLlama2Config.from_pretrained(source, **hub)
        weights = kwargs.get("state_dict")
        if weights is not None:
            own = not any(name.startswith("model.") for name in weights)
        else:
            own = cls.__name__ in (getattr(config, "architectures", None) or ())
        if own:
            return super().from_pretrained(source, *args, **kwargs)
        loaded = VideoLlama2ForConditionalGeneration.from_pretrained(source, *args, **kwargs)
        return (loaded[0].model, loaded[1]) if isinstance(loaded, tuple) else loaded.model

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Float[Tensor, "videos frames 3 height width"], **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple:
        """SigLIP's patches [videos * frames, patches, channels], and as `pooler_output` what the decoder is given.

        That is [videos, tokens, hidden], in the order time, row, column.
        kwargs: `output_hidden_states` and `output_attentions`, of the layers that are computed.
        """
        pixels = pixel_values_videos.to(self.dtype)
        with record_outputs(self.vision_tower.layers, **output_flags(self.config.vision_config, kwargs)) as states:
            patches = self.vision_tower(pixels.flatten(0, 1))
        tokens = self.mm_projector(patches.unflatten(0, pixels.shape[:2]))
        return encoded(patches, tokens, **states)

    @can_return_tuple
    def get_audio_features(
        self, input_features: Float[Tensor, "audios rows bins"], **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple:
        """BEATs' tokens [audios, tokens, width], and as `pooler_output` what the decoder is given.

        That is [audios, tokens, hidden], in the order time, frequency.
        kwargs: `output_hidden_states` and `output_attentions`.
        """
        with record_outputs(self.audio_tower.encoder.layers, **output_flags(self.config, kwargs)) as states:
            hidden = self.audio_tower(input_features.to(self.dtype))
        return encoded(hidden, self.mm_projector_a(hidden), **states)

    @either_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """The decoder's hidden states; arguments as the whole model's, in the order of transformers' Qwen2.5-VL."""
        return self._forward_merged(
            {"pixel_values_videos": pixel_values_videos, "input_features": input_features},
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def embed(
        self,
        input_ids: Int[Tensor, "batch prompt"] | None = None,
        pixel_values_videos: Float[Tensor, "videos frames 3 height width"] | None = None,
        input_features: Float[Tensor, "audios rows bins"] | None = None,
        *,
        inputs_embeds: Float[Tensor, "batch prompt hidden"] | None = None,
        whole: bool = True,
    ) -> Float[Tensor, "batch prompt hidden"]:
        """The decoder's input: text embeddings, with the media's in place of their placeholders.

        inputs_embeds: in place of `input_ids`: the embeddings of placeholders, where no media were merged yet. whole:
        whether the ids are a prompt's, so that each placeholder needs its media.

        Raises: MediaError unless there are as many placeholders as media tokens (see `merged`).
        """
        scheme, encoders = self.config.scheme, cast(Any, self)
        video, audio = None, None
        if pixel_values_videos is not None:
            video = encoders.get_video_features(pixel_values_videos, return_dict=True).pooler_output.flatten(0, 1)
        if input_features is not None:
            audio = encoders.get_audio_features(input_features, return_dict=True).pooler_output.flatten(0, 1)
        features = {scheme.video_token_id: video, scheme.audio_token_id: audio}
        return merged(self.embed_tokens, input_ids, inputs_embeds, features, whole=whole)

    def _complete(self, info: dict[str, Any], source: str) -> None:
        """As the whole model's."""
        complete(self, info, source)


class VideoLlama2ForConditionalGeneration(NativeGeneration, VideoLlama2PreTrainedModel, GenerationMixin):
    """VideoLLaMA2.1-7B-AV."""

    media_inputs = ("pixel_values_videos", "input_features", "feature_attention_mask")

    def __init__(self, config: VideoLlama2Config) -> None:
        super().__init__(config)
        self.model = VideoLlama2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [batch, kept, vocab].

        input_ids: [batch, prompt], one placeholder id per media token. pixel_values_videos: [videos, frames, 3, S, S].
        input_features: [audios, rows, bins]. feature_attention_mask: [audios, rows], True where a row holds sound;
        unused, for layouts. position_ids: counted from each row's first unmasked token, unless given.
        labels: [batch, prompt], -100 where there is none (media and padding).
        logits_to_keep: the last so many, or those at these indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **as_argument(cache),
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            input_features=input_features,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        return self._with_head(outputs, labels, logits_to_keep, **kwargs)

    def get_audio_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling | tuple:
        """As `VideoLlama2Model.get_audio_features`."""
        return self.model.get_audio_features(*args, **kwargs)

    def _complete(self, info: dict[str, Any], source: str) -> None:
        """SigLIP's weights come from the checkpoint, or, if it has none, from where `mm_vision_tower` points."""
        complete(self, info, source)

    def _media_per_row(self, name: str, media: Mapping[str, Tensor], input_ids: Tensor) -> list[int]:
        scheme = self.config.scheme
        token, size = scheme.audio_token_id, scheme.audio_tokens
        if name == "pixel_values_videos":
            token, size = scheme.video_token_id, scheme.video_tokens(media[name].shape[1])
        return ((input_ids == token).sum(1) // size).tolist()
