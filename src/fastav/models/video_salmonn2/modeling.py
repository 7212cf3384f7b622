"""video-SALMONN 2: SigLIP, Whisper and a Q-Former in front of a Qwen2 decoder. Parameters have the original's names."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, Qwen2Model
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import can_return_tuple

from fastav.cache_argument import as_argument, either_name
from fastav.models._checkpoint import refuse_differences
from fastav.models._layer_outputs import output_flags, record_outputs
from fastav.models._layers import SiglipTower, mlp
from fastav.models._merging import encoded, merged, starts_prompt
from fastav.models._native_configuration import mlp_depth
from fastav.models._native_modeling import MediaDecoder, NativeGeneration, repeat_groups
from fastav.models._qformer import Embeddings, QFormer
from fastav.models.video_salmonn2.configuration import VideoSalmonn2Config

BERT_POSITIONS = 512
UNUSED = "speech_Qformer.bert.embeddings.position_ids"


class VideoSalmonn2PreTrainedModel(Qwen2PreTrainedModel):
    """What both models share: the configuration and how absent weights are drawn."""

    config: VideoSalmonn2Config
    config_class = VideoSalmonn2Config
    input_modalities = ["video", "audio", "text"]  # noqa: RUF012 (transformers' own declarations)
    _no_split_modules = ["Qwen2DecoderLayer", "SiglipEncoderLayer", "WhisperEncoderLayer", "Layer"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Embeddings):
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[1])[None])


class VideoSalmonn2Model(MediaDecoder, VideoSalmonn2PreTrainedModel, Qwen2Model):
    """The decoder without its head, and the vision encoder. As in the original, the audio encoder is outside of it.

    It loads its own save or the whole model's.
    """

    _keys_to_ignore_on_load_unexpected = [r"^(lm_head|ln_speech|speech_\w+|final_linear)\b"]  # noqa: RUF012

    def __init__(self, config: VideoSalmonn2Config) -> None:
        super().__init__(config)
        self.vision_tower = SiglipTower(config.vision_config)
        self.mm_projector = mlp(config.mm_hidden_size, config.hidden_size, mlp_depth(config, "mm_projector_type"))
        self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.initializer_range)
        self.post_init()

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Float[Tensor, "frames 3 height width"], **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple:
        """SigLIP's patches [frames, patches, channels], and as `pooler_output` what the decoder is given.

        That is [frames, tokens, hidden], row by row, a newline after each row.
        kwargs: `output_hidden_states` and `output_attentions`.
        """
        with record_outputs(self.vision_tower.layers, **output_flags(self.config.vision_config, kwargs)) as states:
            patches = self.vision_tower(pixel_values_videos.to(self.dtype))
        pooled = self.pool(self.mm_projector(patches))
        newlines = self.image_newline.to(pooled).expand(*pooled.shape[:2], 1, -1)
        tokens = torch.cat([pooled, newlines], dim=2).flatten(1, 2)
        return encoded(patches, tokens, **states)

    def pool(self, patches: Float[Tensor, "frames patches hidden"]) -> Float[Tensor, "frames rows columns hidden"]:
        """The maximum of each square of patches; what is left of the last row and column is not seen."""
        side = math.isqrt(patches.shape[1])
        pixels = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return nn.functional.max_pool2d(pixels, self.config.mm_spatial_pool_stride).permute(0, 2, 3, 1)

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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """The decoder's hidden states; arguments as the whole model's, in the order of transformers' Qwen2.5-VL."""
        return self._forward_merged(
            {"pixel_values_videos": pixel_values_videos},
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
        pixel_values_videos: Float[Tensor, "frames 3 height width"] | None = None,
        audio: Float[Tensor, "tokens hidden"] | None = None,
        *,
        inputs_embeds: Float[Tensor, "batch prompt hidden"] | None = None,
        whole: bool = True,
    ) -> Float[Tensor, "batch prompt hidden"]:
        """The decoder's input: text embeddings, with the media's in place of their placeholders.

        audio: the tokens of all sounds, in the order of their placeholders. inputs_embeds: in place of `input_ids`: the
        embeddings of placeholders, where no media were merged yet. whole: whether the ids are a prompt's, so that each
        placeholder needs its media.

        Raises: MediaError unless there are as many placeholders as media tokens (see `merged`).
        """
        scheme, video, blank = self.config.scheme, None, None
        if pixel_values_videos is not None:
            seen = cast(Any, self).get_video_features(pixel_values_videos, return_dict=True)
            video, blank = seen.pooler_output.flatten(0, 1), scheme.blank_token_id
        features = {scheme.video_token_id: video, scheme.audio_token_id: audio}
        return merged(self.embed_tokens, input_ids, inputs_embeds, features, whole=whole, blank=blank)


class VideoSalmonn2ForConditionalGeneration(NativeGeneration, VideoSalmonn2PreTrainedModel, GenerationMixin):
    """video-SALMONN 2."""

    media_inputs = ("pixel_values_videos", "input_features", "feature_attention_mask", "audio_index", "piece_index")

    def __init__(self, config: VideoSalmonn2Config) -> None:
        super().__init__(config)
        width, query = config.speech_config.d_model, config.qformer.hidden_size
        self.model = VideoSalmonn2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.speech_encoder = WhisperEncoder(config.speech_config)
        self.ln_speech = nn.LayerNorm(width)
        queries = torch.randn(1, config.num_speech_query_token, query) * config.initializer_range
        self.speech_query_tokens = nn.Parameter(queries)
        self.speech_Qformer = QFormer(config.qformer, width, positions=BERT_POSITIONS)
        self.speech_llama_proj = nn.Linear(query, config.hidden_size)
        self.final_linear = mlp(config.hidden_size, config.hidden_size, 2) if config.use_final_linear else nn.Identity()
        self.post_init()

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: Float[Tensor, "pieces bins columns"],
        piece_index: Int[Tensor, " pieces"] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Whisper's positions [pieces, positions, width], and as `pooler_output` what the decoder is given.

        That is [pieces, tokens, hidden], with what marks the place of each piece in its sound.
        piece_index: the number of each piece in its sound, from 0; None: they are the pieces of one sound, in order.
        kwargs: as the encoder takes them (`output_hidden_states`, ...).
        """
        if piece_index is None:
            piece_index = torch.arange(len(input_features), device=input_features.device)
        whisper = self.speech_encoder(input_features.to(self.dtype), **{**kwargs, "return_dict": True})
        hidden = whisper.last_hidden_state
        tokens = self.speech_tokens(hidden)
        tokens = tokens + piece_marks(piece_index, tokens.shape[-1]).to(tokens)[:, None]
        return encoded(hidden, tokens, hidden_states=whisper.hidden_states, attentions=whisper.attentions)

    def windows(self, hidden: Float[Tensor, "pieces positions width"]) -> Float[Tensor, "windows queries channels"]:
        """The Q-Former's output for each window of each piece."""
        scheme = self.config.scheme
        windows = self.ln_speech(hidden).unfold(1, scheme.window, scheme.stride).flatten(0, 1).transpose(1, 2)
        return self.speech_Qformer(self.speech_query_tokens, windows)

    def speech_tokens(self, hidden: Float[Tensor, "pieces positions width"]) -> Float[Tensor, "pieces tokens hidden"]:
        """The tokens of each piece of sound, in the order of time, without its place in the sound."""
        tokens = self.final_linear(self.speech_llama_proj(self.windows(hidden)))
        return tokens.flatten(0, 1).unflatten(0, (len(hidden), -1))

    def embed(
        self,
        input_ids: Int[Tensor, "batch prompt"] | None = None,
        pixel_values_videos: Float[Tensor, "frames 3 height width"] | None = None,
        input_features: Float[Tensor, "pieces bins columns"] | None = None,
        audio_index: Int[Tensor, " placeholders"] | None = None,
        piece_index: Int[Tensor, " pieces"] | None = None,
        *,
        inputs_embeds: Float[Tensor, "batch prompt hidden"] | None = None,
        whole: bool = True,
    ) -> Float[Tensor, "batch prompt hidden"]:
        """The decoder's input; arguments as `forward`, and as `VideoSalmonn2Model.embed`.

        Raises: as that.
        """
        audio = None
        if input_features is not None:
            sound = cast(Any, self).get_audio_features(input_features, piece_index, return_dict=True)
            audio = sound.pooler_output.flatten(0, 1)
            audio = audio if audio_index is None else audio[audio_index]
        return self.model.embed(input_ids, pixel_values_videos, audio, inputs_embeds=inputs_embeds, whole=whole)

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
        audio_index: Tensor | None = None,
        piece_index: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [batch, kept, vocab].

        input_ids: [batch, prompt], one placeholder id per media token. pixel_values_videos: [frames, 3, S, S], of all
        videos. input_features: [pieces, bins, columns], of all sounds. feature_attention_mask: [pieces, columns], True
        where a column holds sound; unused, for layouts. audio_index: [audio placeholders], which token of which piece
        each stands for, counted through all pieces (a token may be repeated); by default all, in order.
        piece_index: [pieces], the number of each in its sound; by default there is one sound.
        labels: [batch, prompt], -100 where there is none (media and padding).
        logits_to_keep: the last so many, or those at these indices.
        """
        inputs_embeds = self.embed(
            input_ids,
            pixel_values_videos,
            input_features,
            audio_index,
            piece_index,
            inputs_embeds=inputs_embeds,
            whole=starts_prompt(cache, input_ids),
        )
        outputs = self.model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            **as_argument(cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        return self._with_head(outputs, labels, logits_to_keep, **kwargs)

    def _complete(self, info: dict[str, Any], source: str) -> None:
        """A checkpoint may lack a buffer of numbers that nothing reads."""
        info["missing_keys"] = set(info["missing_keys"]) - {UNUSED}
        refuse_differences(info, source)

    def _repeat_media(self, media: Mapping[str, Tensor], input_ids: Tensor, times: int) -> dict[str, Tensor]:
        """Frames are repeated with their prompt; sounds are encoded once, and their tokens repeated."""
        scheme, repeated = self.config.scheme, dict(media)
        sound = media.get("input_features")
        if sound is not None and "audio_index" not in media:
            repeated["audio_index"] = torch.arange(len(sound) * scheme.piece_tokens, device=sound.device)
        sizes = {
            "pixel_values_videos": (scheme.video_token_id, scheme.frame_tokens),
            "audio_index": (scheme.audio_token_id, 1),
        }
        for name, (token, size) in sizes.items():
            if name in repeated:
                groups = ((input_ids == token).sum(1) // size).tolist()
                repeated[name] = repeat_groups(repeated[name], groups, times)
        return repeated


def piece_marks(piece_index: Int[Tensor, " pieces"], hidden: int) -> Float[Tensor, "pieces hidden"]:
    """What is added to the tokens of a sound's n-th piece: nothing to the first, sinusoids of n - 1 to the others.

    Source: arXiv:1706.03762, section 3.5, sines and cosines interleaved.
    """
    rates = 10_000.0 ** (-torch.arange(0, hidden, 2, device=piece_index.device) / hidden)
    angles = (piece_index - 1)[:, None] * rates
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :hidden]
    return waves.masked_fill((piece_index == 0)[:, None], 0)
